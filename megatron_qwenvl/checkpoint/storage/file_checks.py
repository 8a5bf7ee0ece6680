"""Comparison of files with the sizes and digests that were recorded when they were written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from megatron_qwenvl.runtime.retry import retry_read

from .errors import CheckpointError
from .reading import read_blocks
from .writing import FileRecord, open_durable

OnBytes = Callable[[int], None]
"""Called with the number of bytes just handled; drives a progress line."""


def no_progress(count: int) -> None:
    """An `OnBytes` for work whose progress is not shown."""


def size_problem(path: Path, record: FileRecord) -> str | None:
    """Compare a file with its recorded size; returns what is wrong, or None."""
    try:
        is_file, found = retry_read(
            path, lambda: (path.is_file(), path.stat().st_size if path.is_file() else 0)
        )
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if not is_file:
        return f"{path}: missing (expected {record.bytes} bytes)"
    if found != record.bytes:
        return f"{path}: expected {record.bytes} bytes, found {found}"
    return None


def file_problem(path: Path, record: FileRecord, on_bytes: OnBytes = no_progress) -> str | None:
    """Compare a file with its recorded size and digest; returns what is wrong, or None."""
    if problem := size_problem(path, record):
        return problem
    digest = hashlib.sha256()
    try:
        for block in read_blocks(path):
            digest.update(block)
            on_bytes(len(block))
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if (found_digest := digest.hexdigest()) != record.sha256:
        return f"{path}: damaged: expected sha256 {record.sha256[:16]}..., found {found_digest[:16]}..."
    return None


def copy_file(source: Path, target: Path, record: FileRecord, on_bytes: OnBytes = no_progress) -> None:
    """Copy a file durably and compare the source with its record in the same pass.

    Raises:
        CheckpointError: the source is missing, truncated or damaged.
    """
    if not source.is_file():
        raise CheckpointError(f"{source}: missing (expected {record.bytes} bytes)")
    with open_durable(target) as writer:
        for block in read_blocks(source):
            writer.write(block)
            on_bytes(len(block))
        found = writer.sync()
    if found != record:
        raise CheckpointError(
            f"{source}: damaged: expected {record.bytes} bytes with sha256 {record.sha256[:16]}..., "
            f"found {found.bytes} bytes with {found.sha256[:16]}..."
        )
