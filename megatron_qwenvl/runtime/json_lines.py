"""A file of JSON records, one a line, that survives what interrupts its writing.

A full disk or a kill can leave the start of a record. Nothing is ever appended to such a line: it is completed or cut
off before the next record, and readers pass over it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TAIL_BYTES = 1 << 16


class RecordFile:
    """Appends records to a file; one process at a time.

    Args:
        path: the file; made if it is missing, mended if its last line is torn.

    Raises:
        OSError: it cannot be opened or mended.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._torn = False
        try:
            self._end = _mend(self._descriptor)
        except OSError:
            os.close(self._descriptor)
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Write one record whole. What a failed write left is overwritten by the next one.

        Raises:
            OSError: it was not written whole.
        """
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        self._cut_off()
        self._torn, done = True, 0
        while done < len(line):
            done += os.pwrite(self._descriptor, line[done:], self._end + done)
        self._torn = False
        self._end += len(line)

    def close(self) -> None:
        """Close the file after cutting off what a failed write left."""
        try:
            self._cut_off()
        finally:
            os.close(self._descriptor)

    def _cut_off(self) -> None:
        if self._torn:
            os.ftruncate(self._descriptor, self._end)
            self._torn = False


def _mend(descriptor: int) -> int:
    """Complete or cut off a torn last line; returns the size of the file."""
    size = os.fstat(descriptor).st_size
    start, torn = size, b""
    while start > 0 and b"\n" not in torn:
        start = max(0, start - _TAIL_BYTES)
        torn = os.pread(descriptor, size - start, start)
    start += torn.rfind(b"\n") + 1
    torn = torn[torn.rfind(b"\n") + 1 :]
    if torn and _parse(torn) is not None:  # all but the end of the line is there
        os.pwrite(descriptor, b"\n", size)
        return size + 1
    os.ftruncate(descriptor, start)
    return start


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records of a file, in their order; torn lines are left out.

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
