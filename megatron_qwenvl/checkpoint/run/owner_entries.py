"""Files of a run's `owner` folder: who has owned the run, in the order of their numbers.

RUN/owner/
    00000007.json  who owns the run: the highest number does, until the file says when it was released
    00000007.beat  a counter that the owner raises while it lives
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from megatron_qwenvl.checkpoint.storage.json_text import parse_json
from megatron_qwenvl.runtime.identity import ProcessIdentity

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}


@dataclass(frozen=True)
class OwnerEntry:
    """One owner of the run."""

    number: int
    """Position among the owners."""
    token: str
    """Random text of this start alone."""
    process: ProcessIdentity | None
    """The process that made the entry; None: the file is damaged."""
    since: str = "an unknown time"
    """Time at which the run was taken."""
    released: str | None = None
    """Time at which the owner ended; None: it has not, or without saying so."""


def entry_path(folder: Path, number: int) -> Path:
    """File of an entry."""
    return folder / f"{number:08d}.json"


def beat_path(folder: Path, number: int) -> Path:
    """File that the owner of this number writes while it lives."""
    return folder / f"{number:08d}.beat"


def number_of(path: Path) -> int | None:
    """Number in the name of an entry or of its beat; None: another file."""
    return int(path.stem) if path.stem.isdigit() and path.suffix in (".json", ".beat") else None


def read_newest(folder: Path) -> OwnerEntry | None:
    """Read the entry of the highest number; None: there is none.

    Raises:
        OSError: the folder cannot be read.
    """
    while True:
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return None
        numbers = [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()]
        if not numbers:
            return None
        with suppress(FileNotFoundError):  # a newer owner has removed it
            return read_entry(entry_path(folder, max(numbers)))


def read_entry(path: Path) -> OwnerEntry:
    """Read one entry; a damaged one has no process.

    Raises:
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        found: dict[str, Any] = parse_json(content)
        process = ProcessIdentity(**found.pop("process"))
        return OwnerEntry(**{**found, "process": process})
    except (ValueError, TypeError, KeyError, AttributeError):
        return OwnerEntry(int(path.stem), f"damaged: {content[:64]!r}", None)


def encode_entry(entry: OwnerEntry) -> bytes:
    """Content of an entry's file."""
    return (json.dumps(asdict(entry), indent=1) + "\n").encode()


def create_entry(folder: Path, entry: OwnerEntry) -> bool:
    """Create the file of an entry with its whole content; False if another process has created it.

    Raises:
        OSError: the file system refuses.
    """
    path, content = entry_path(folder, entry.number), encode_entry(entry)
    tmp_file = path.with_name(f".{uuid4().hex}")
    try:
        _write(tmp_file, content)
        try:
            os.link(tmp_file, path)
        except FileExistsError:
            return False
        except OSError as error:
            if os.stat(tmp_file).st_nlink == 2:  # NFS: done, but the answer was lost
                return True
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_links(path, content)
    finally:
        tmp_file.unlink(missing_ok=True)
    return True


def _create_without_links(path: Path, content: bytes) -> bool:
    try:
        _write(path, content)
    except FileExistsError:
        return False
    return True


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
