"""Files of a checkpoint: digests taken while writing, durable writes and checks against what was recorded."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

BLOCK_BYTES = 16 << 20
"""Bytes read or written at a time when a file is copied, digested or written."""

OnBytes = Callable[[int], None]
"""Told the number of bytes just handled; drives progress."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names the place, the expected and the
    found."""


class FileSlice(io.RawIOBase):
    """A byte range of a file as a file of its own, read straight into the reader's memory.

    Args:
        path: file to read from.
        start: first byte.
        length: bytes; fewer are read where the file ends before.
    """

    def __init__(self, path: Path, start: int, length: int) -> None:
        self._file = open(path, "rb", buffering=0)
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
        self._file.seek(self._start + self._position)
        done = 0
        while done < len(view) and (count := self._file.readinto(view[done:])):
            done += count
        self._position += done
        return done

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()
        super().close()


class FileRecord(BaseModel):
    """What a file held when it was written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    """Size."""
    sha256: str
    """Digest of the content, lower-case hexadecimal."""


class DigestWriter(io.RawIOBase):
    """Sequential file writer that digests what passes through it. Not seekable.

    A buffer is digested while it is written, and the disk starts on every block at once instead of at the end.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)
        self._hash = hashlib.sha256()
        self._digesting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="digest")
        self._written = 0
        self.failure: OSError | None = None
        """Why a write failed; torch's own writer hides it."""

    def writable(self) -> bool:
        """Always True."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._written

    def write(self, data: Any) -> int:
        """Write and digest all of `data` (any contiguous buffer)."""
        view = memoryview(data).cast("B")
        digested = self._digesting.submit(self._hash.update, view)
        try:
            self._write(view)
        except OSError as error:
            self.failure = error
            raise
        finally:
            digested.result()
        self._written += len(view)
        return len(view)

    def _write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = self._file.write(view[done : done + BLOCK_BYTES])  # a raw write may be short
            # "Not needed again" makes the kernel write dirty pages out now.
            os.posix_fadvise(self._file.fileno(), self._written + done, count, os.POSIX_FADV_DONTNEED)
            done += count

    def sync(self) -> FileRecord:
        """Make the content durable and return its record."""
        os.fsync(self._file.fileno())
        return FileRecord(bytes=self._written, sha256=self._hash.hexdigest())

    def close(self) -> None:
        """Close the file; idempotent."""
        self._digesting.shutdown()
        self._file.close()
        super().close()


@contextmanager
def writing(path: Path) -> Iterator[DigestWriter]:
    """Open a `DigestWriter` and close it at the end; call `sync` inside to get the record."""
    writer = DigestWriter(path)
    try:
        yield writer
    finally:
        writer.close()


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write a small file durably."""
    with writing(path) as writer:
        writer.write(data)
        return writer.sync()


def replace_bytes(path: Path, data: bytes) -> None:
    """Replace a small file atomically: readers see the old or the new content, also after a crash."""
    aside = path.with_name(path.name + ".new")
    write_bytes(aside, data)
    os.replace(aside, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_blocks(path: Path) -> Iterator[memoryview]:
    """Yield the file's content in blocks; a block is valid until the next one is asked for."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def file_problem(path: Path, record: FileRecord) -> str | None:
    """What is wrong with the file, or None if it is what was recorded."""
    if not path.is_file():
        return f"{path}: missing (expected {record.bytes} bytes)"
    if (found := path.stat().st_size) != record.bytes:
        return f"{path}: expected {record.bytes} bytes, found {found}"
    digest = hashlib.sha256()
    try:
        for block in read_blocks(path):
            digest.update(block)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if (found_digest := digest.hexdigest()) != record.sha256:
        return f"{path}: damaged: expected sha256 {record.sha256[:16]}..., found {found_digest[:16]}..."
    return None


def copy_file(source: Path, target: Path, record: FileRecord) -> None:
    """Copy durably, checking in the same pass that the source is what was recorded.

    Raises:
        CheckpointError: the source is missing, truncated or damaged.
    """
    if not source.is_file():
        raise CheckpointError(f"{source}: missing (expected {record.bytes} bytes)")
    with writing(target) as writer:
        for block in read_blocks(source):
            writer.write(block)
        found = writer.sync()
    if found != record:
        raise CheckpointError(
            f"{source}: damaged: expected {record.bytes} bytes with sha256 {record.sha256[:16]}..., "
            f"found {found.bytes} bytes with {found.sha256[:16]}..."
        )


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill a directory aside and give it its name when it is complete; on failure nothing remains.

    Raises:
        CheckpointError: `path` exists.
    """
    if path.exists():
        raise CheckpointError(f"{path}: exists already; choose another name or remove it")
    aside = path.with_name(path.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_directory(aside)
        aside.rename(path)
        sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
