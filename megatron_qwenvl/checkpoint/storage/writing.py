"""Durable writing of files, with their digest taken on the way."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from .reading import BLOCK_BYTES

_WRITE_OUT_BYTES = 16 << 20
"""The disk starts writing whenever so many new bytes have come together."""


class FileRecord(BaseModel):
    """Size and digest of a file when it was written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    """Size."""
    sha256: str
    """Digest of the content, lower-case hexadecimal."""


class DurableWriter(io.RawIOBase):
    """Sequential file writer for content that must survive a crash. Not seekable.

    The disk starts while the file is being written, not at its end.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)
        self._written = 0
        self._handed_over = 0
        self.failure: OSError | None = None
        """Error of a failed write, which torch's own writer hides."""

    def writable(self) -> bool:
        """Always True."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._written

    def write(self, data: Any) -> int:
        """Write all of `data` (any contiguous buffer)."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += self._write_block(view[done : done + BLOCK_BYTES])
        except OSError as error:
            self.failure = error
            raise
        return len(view)

    def _write_block(self, block: memoryview) -> int:
        count = self._file.write(block)  # a raw write may be short
        self._written += count
        if (length := self._written - self._handed_over) >= _WRITE_OUT_BYTES:
            _not_needed_again(self._file.fileno(), self._handed_over, length)  # dirty: on its way from now on
            self._handed_over = self._written
        return count

    def make_durable(self) -> None:
        """Wait until the content is on the disk."""
        os.fsync(self._file.fileno())
        _not_needed_again(self._file.fileno(), 0, 0)  # clean pages: memory for what is still to be read

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()
        super().close()


def _not_needed_again(descriptor: int, start: int, length: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


class DigestWriter(DurableWriter):
    """A `DurableWriter` that digests every block right after it is written, while it is in the processor's cache."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._hash = hashlib.sha256()

    def _write_block(self, block: memoryview) -> int:
        count = super()._write_block(block)
        self._hash.update(block[:count])
        return count

    def sync(self) -> FileRecord:
        """Make the content durable and return its record."""
        self.make_durable()
        return FileRecord(bytes=self._written, sha256=self._hash.hexdigest())


@contextmanager
def open_durable(path: Path) -> Iterator[DigestWriter]:
    """Open a `DigestWriter`, to be closed at the end; call `sync` before that to get the record."""
    with closing(DigestWriter(path)) as writer:
        yield writer


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write a small file durably."""
    with open_durable(path) as writer:
        writer.write(data)
        return writer.sync()


def replace_bytes(path: Path, data: bytes) -> None:
    """Replace a small file atomically: readers see the old or the new content, also after a crash."""
    tmp_file = path.with_name(path.name + ".new")
    write_bytes(tmp_file, data)
    os.replace(tmp_file, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names of a directory's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
