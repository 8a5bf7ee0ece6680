"""File of JSON records, one per line, that stays readable when a write is interrupted.

A full disk or a kill can leave an incomplete last record. Nothing is ever appended to such a line: it is completed or
truncated before the next record, and readers skip it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TAIL_BYTES = 1 << 16


class RecordFile:
    """Writer that appends records to a file; one process at a time.

    Args:
        path: the file; created if it is missing, repaired if its last line is incomplete.

    Raises:
        OSError: it cannot be opened or repaired.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._torn = False
        try:
            self._end = _repair(self._descriptor)
        except OSError:
            os.close(self._descriptor)
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Write one complete record. The next record overwrites the remains of a failed write.

        Raises:
            OSError: it was not written completely.
        """
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        self._cut_off()
        self._torn, done = True, 0
        while done < len(line):
            done += os.pwrite(self._descriptor, line[done:], self._end + done)
        self._torn = False
        self._end += len(line)

    def close(self) -> None:
        """Truncate the remains of a failed write and close the file."""
        try:
            self._cut_off()
        finally:
            os.close(self._descriptor)

    def _cut_off(self) -> None:
        if self._torn:
            os.ftruncate(self._descriptor, self._end)
            self._torn = False


def _repair(descriptor: int) -> int:
    """Complete or truncate an incomplete last line; returns the size of the file."""
    size = os.fstat(descriptor).st_size
    start, torn = size, b""
    while start > 0 and b"\n" not in torn:
        start = max(0, start - _TAIL_BYTES)
        torn = os.pread(descriptor, size - start, start)
    start += torn.rfind(b"\n") + 1
    torn = torn[torn.rfind(b"\n") + 1 :]
    if torn and _parse(torn) is not None:  # only the newline is missing
        os.pwrite(descriptor, b"\n", size)
        return size + 1
    os.ftruncate(descriptor, start)
    return start


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file in order; incomplete lines are skipped.

    Raises:
        OSError: it cannot be read.
    """
    for line in path.read_bytes().splitlines():
        if (record := _parse(line)) is not None:
            yield record


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
