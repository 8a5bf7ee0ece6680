"""Reading of files in place and in blocks, repeated while the file system refuses."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_qwenvl.runtime.retry import retry_read

BLOCK_BYTES = 1 << 20
"""Bytes read, digested or written at a time: few enough to stay in the processor's cache in between."""


class FileSlice(io.RawIOBase):
    """A byte range of a file as a file of its own, read straight into the reader's memory.

    Args:
        path: file to read from.
        start: first byte.
        length: bytes; fewer are read where the file ends before.
    """

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._path = path
        self._file = _opened(path)
        self._start = start
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        """Always True."""
        return True

    def seekable(self) -> bool:
        """Always True."""
        return True

    def tell(self) -> int:
        """Position within the range."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move within the range."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the range and the file go."""
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        done = retry_read(self._path, lambda: self._fill(view))
        self._position += done
        return done

    def _fill(self, view: memoryview) -> int:
        try:
            self._file.seek(self._start + self._position)
            done = 0
            while done < len(view) and (count := self._file.readinto(view[done:])):
                done += count
            return done
        except OSError:  # the open file may be stale for good
            self._file.close()
            self._file = _open_raw(self._path)
            raise

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()
        super().close()


def open_whole(path: Path) -> FileSlice:
    """Open a file whose reads are repeated while the file system refuses.

    Raises:
        OSError: it cannot be read.
    """
    return FileSlice(path, 0, retry_read(path, lambda: os.stat(path)).st_size)


def _opened(path: Path) -> io.FileIO:
    return retry_read(path, lambda: _open_raw(path))


def _open_raw(path: Path) -> io.FileIO:
    return open(path, "rb", buffering=0)


def read_blocks(path: Path) -> Iterator[memoryview]:
    """Yield the file's content in blocks; a block is valid until the next one is asked for."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with open_whole(path) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]
