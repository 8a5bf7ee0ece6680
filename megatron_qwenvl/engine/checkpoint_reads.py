"""Lets the engine's own readers of checkpoints outlast a file system that is away for a while.

megatron-core and torch open the files of a distributed checkpoint themselves. One rank that fails alone there would
leave the others waiting, so it is the opening and reading of single files that is repeated, not the load.

Relies on where these names are looked up: megatron-core 0.16 uses `os` and `open` of its modules, 0.19 one object
`maybe_msc` with the same functions; torch's `FileSystem.create_stream` and `torch.serialization.open` open the rest.
Held by `tests/unit/engine/test_checkpoint_reads.py`.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing import core, serialization, validation
from torch.distributed.checkpoint import filesystem

from megatron_qwenvl.checkpoint.storage.reading import open_whole
from megatron_qwenvl.runtime.retry import retry_read

from .replacements import Replacements
from .versions import engine_is_at_least


@contextmanager
def patient_engine_reads() -> Iterator[None]:
    """While this lasts, what the engine opens to read is read with patience."""
    replacements = Replacements()
    for owner, name, patient in (
        *_engine_names(),
        (torch.serialization, "open", _open),  # common.pt
        (filesystem.FileSystem, "create_stream", _create_stream),  # .metadata and the tensors
    ):
        replacements.replace(owner, name, patient)
    try:
        yield
    finally:
        replacements.restore()


def _engine_names() -> list[tuple[Any, str, Any]]:
    """Modules of megatron-core, the names by which they reach the file system, and what is to stand there."""
    if engine_is_at_least(0, 19):
        return [(module, "maybe_msc", _STORAGE) for module in (core, serialization, validation)]
    return [
        (validation, "os", _STORAGE.os),  # is there a folder?
        (core, "os", _STORAGE.os),  # is there a metadata.json?
        (core, "open", _open),
    ]


def _open(path: Any, mode: str = "r", *more: Any, **options: Any) -> IO[Any]:
    if mode not in ("r", "rb"):
        return open(path, mode, *more, **options)
    binary = io.BufferedReader(open_whole(Path(path)))
    return binary if mode == "rb" else io.TextIOWrapper(binary, encoding="utf-8")


def _stat(path: Any) -> os.stat_result | None:
    """Status of the path; None: it does not exist. `os.path` would take any error for that."""
    try:
        return retry_read(Path(path), lambda: os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_directory(path: Any) -> bool:
    found = _stat(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


_STORAGE = SimpleNamespace(
    os=SimpleNamespace(
        path=SimpleNamespace(
            join=os.path.join, isdir=_is_directory, exists=lambda path: _stat(path) is not None
        )
    ),
    open=_open,
    path_isdir=lambda path, strict=True: _is_directory(path),
    Path=lambda path: SimpleNamespace(exists=lambda: _stat(path) is not None),
    torch=torch,
)
"""As much of the file system as megatron-core uses in these modules while it reads."""


@contextmanager
def _create_stream(self: filesystem.FileSystem, path: Any, mode: str) -> Iterator[IO[Any]]:
    with _open(path, mode) as stream:
        yield stream
