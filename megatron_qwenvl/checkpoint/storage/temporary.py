"""Directories that are filled aside before they get their name, and those that a killed process left behind.

In each lies a note of its maker. What a live process fills is never touched.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

from megatron_qwenvl.runtime.identity import ProcessIdentity
from megatron_qwenvl.runtime.slurm import is_job_over

from .json_text import parse_json

logger = logging.getLogger(__name__)

MAKER_NAME = ".maker.json"
_SUFFIX = re.compile(r"\.[0-9a-f]{12}\.tmp")
_OLD_SECONDS = 24 * 3600.0
"""Without a word from its maker, a directory in which nothing has changed for so long is left over."""


def make_aside(path: Path) -> Path:
    """Make a directory beside `path` that nobody else has, with a note of this process in it."""
    aside = path.with_name(f"{path.name}.{uuid4().hex[:12]}.tmp")
    aside.mkdir()
    maker = ProcessIdentity.of_this_process()
    (aside / MAKER_NAME).write_text(json.dumps(asdict(maker)), encoding="utf-8")
    return aside


def remove_leftovers(path: Path, aside: Path) -> None:
    """Remove what killed processes left aside of `path`.

    Args:
        path: directory that is about to be made.
        aside: where this process fills it; was just made, so its time is the file system's own now.
    """
    now = aside.stat().st_mtime
    for other in path.parent.glob("*.tmp"):
        name = other.name.removeprefix(path.name)
        if other != aside and name != other.name and _SUFFIX.fullmatch(name) and _is_left_over(other, now):
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
    """Newest modification time below a directory; that of a file that vanishes meanwhile is now, as somebody works."""
    try:
        return max(path.stat().st_mtime for path in (directory, *directory.rglob("*")))
    except OSError:
        return float("inf")
