"""Directories that get their name when they are complete, and the temporary ones that a killed process left behind.

A temporary directory holds a note of the process that fills it. That of a live process is never touched.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

from megatron_qwenvl.runtime.identity import ProcessIdentity
from megatron_qwenvl.runtime.listing import entries_below, matching_entries
from megatron_qwenvl.runtime.slurm import is_job_over

from .errors import CheckpointError
from .json_text import parse_json
from .writing import sync_directory

logger = logging.getLogger(__name__)

MAKER_NAME = ".maker.json"
_SUFFIX = re.compile(r"\.[0-9a-f]{12}\.tmp")
_OLD_SECONDS = 24 * 3600.0
"""If its maker is unknown, a directory that has not changed for so long is a leftover."""


def check_places(path: Path, sources: Iterable[Path]) -> None:
    """Make sure that a result at `path` and the sources do not lie inside one another.

    Raises:
        CheckpointError: they do.
    """
    target = path.resolve()
    for source in sources:
        if target.is_relative_to(source.resolve()) or source.resolve().is_relative_to(target):
            raise CheckpointError(
                f"{path}: lies inside {source}, or the other way round; choose another place"
            )


def check_target(path: Path, sources: Iterable[Path]) -> None:
    """Make sure that a directory can be made at `path` without touching what is there.

    Raises:
        CheckpointError: `path` exists, or it and a source lie inside one another.
    """
    check_places(path, sources)
    if path.exists():
        raise CheckpointError(f"{path}: exists already; choose another name or remove it")


@contextmanager
def new_directory(path: Path, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """Fill a temporary directory and give it its name when it is complete; after an error nothing remains.

    The temporary directory has a unique name, so that nothing that was there before is touched, and of two runs with
    the same `path` the later one fails. Leftovers of killed runs with this `path` are removed.

    Args:
        path: directory to make.
        sources: files and directories that are read meanwhile.

    Raises:
        CheckpointError: `path` exists, or was created meanwhile, or it and a source lie inside one another.
    """
    check_target(path, sources)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_dir = make_tmp_dir(path)
    try:
        remove_leftovers(path, tmp_dir)
        yield tmp_dir
        (tmp_dir / MAKER_NAME).unlink()
        sync_directory(tmp_dir)
        if path.exists():  # a rename would replace an empty directory
            raise CheckpointError(f"{path}: exists already; another run made it meanwhile")
        tmp_dir.rename(path)
        sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(tmp_dir, ignore_errors=True)
        raise


def make_tmp_dir(path: Path) -> Path:
    """Make a temporary directory with a unique name beside `path`, with a note of this process in it."""
    tmp_dir = path.with_name(f"{path.name}.{uuid4().hex[:12]}.tmp")
    tmp_dir.mkdir()
    maker = ProcessIdentity.of_this_process()
    (tmp_dir / MAKER_NAME).write_text(json.dumps(asdict(maker)), encoding="utf-8")
    return tmp_dir


def remove_leftovers(path: Path, tmp_dir: Path) -> None:
    """Remove the temporary directories that killed processes left beside `path`.

    Args:
        path: directory that is about to be made.
        tmp_dir: temporary directory of this process; just made, so that its time is the file system's present.
    """
    now = tmp_dir.stat().st_mtime
    for other in matching_entries(path.parent, "*.tmp"):
        name = other.name.removeprefix(path.name)
        if other != tmp_dir and name != other.name and _SUFFIX.fullmatch(name) and _is_left_over(other, now):
            logger.warning("removing %s, which a killed conversion left behind", other)
            shutil.rmtree(other, ignore_errors=True)


def _is_left_over(directory: Path, now: float) -> bool:
    maker = _maker_of(directory)
    alive = maker.is_alive(ProcessIdentity.of_this_process()) if maker else None
    if alive is None and maker and maker.job:
        over = is_job_over(maker.job)
        alive = None if over is None else not over
    return now - _last_change(directory) > _OLD_SECONDS if alive is None else not alive


def _maker_of(directory: Path) -> ProcessIdentity | None:
    try:
        return ProcessIdentity(**parse_json((directory / MAKER_NAME).read_bytes()))
    except (OSError, ValueError, TypeError):  # by an older version, or killed before it was written
        return None


def _last_change(directory: Path) -> float:
    """Newest modification time below a directory; infinite if a file vanishes meanwhile, as a process works there."""
    try:
        return max(path.stat().st_mtime for path in (directory, *entries_below(directory)))
    except OSError:
        return float("inf")
