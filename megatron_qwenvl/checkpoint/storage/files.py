"""Files of a checkpoint: digests taken while writing, durable writes and checks against what was recorded."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from megatron_qwenvl.runtime.retry import reads

from .temporary import MAKER_NAME, make_aside, remove_leftovers

BLOCK_BYTES = 1 << 20
"""Bytes read, digested or written at a time: few enough to stay in the processor's cache in between."""

_WRITE_OUT_BYTES = 16 << 20
"""The disk starts on what was written whenever so much has come together."""

OnBytes = Callable[[int], None]
"""Told the number of bytes just handled; drives progress."""


def untold(count: int) -> None:
    """An `OnBytes` for work that nobody watches."""


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
        done = reads(self._path, lambda: self._fill(view))
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
    """A file, to be read with patience.

    Raises:
        OSError: it cannot be read.
    """
    return FileSlice(path, 0, reads(path, lambda: os.stat(path)).st_size)


def _opened(path: Path) -> io.FileIO:
    return reads(path, lambda: _open_raw(path))


def _open_raw(path: Path) -> io.FileIO:
    return open(path, "rb", buffering=0)


class FileRecord(BaseModel):
    """What a file held when it was written."""

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
        """Why a write failed; torch's own writer hides it."""

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
def writing(path: Path) -> Iterator[DigestWriter]:
    """Open a `DigestWriter` and close it at the end; call `sync` inside to get the record."""
    with closing(DigestWriter(path)) as writer:
        yield writer


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
    with open_whole(path) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def size_problem(path: Path, record: FileRecord) -> str | None:
    """What is wrong with the file as far as its size tells, or None."""
    try:
        is_file, found = reads(path, lambda: (path.is_file(), path.stat().st_size if path.is_file() else 0))
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if not is_file:
        return f"{path}: missing (expected {record.bytes} bytes)"
    if found != record.bytes:
        return f"{path}: expected {record.bytes} bytes, found {found}"
    return None


def file_problem(path: Path, record: FileRecord, on_bytes: OnBytes = untold) -> str | None:
    """What is wrong with the file, or None if it is what was recorded."""
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


def copy_file(source: Path, target: Path, record: FileRecord, on_bytes: OnBytes = untold) -> None:
    """Copy durably, checking in the same pass that the source is what was recorded.

    Raises:
        CheckpointError: the source is missing, truncated or damaged.
    """
    if not source.is_file():
        raise CheckpointError(f"{source}: missing (expected {record.bytes} bytes)")
    with writing(target) as writer:
        for block in read_blocks(source):
            writer.write(block)
            on_bytes(len(block))
        found = writer.sync()
    if found != record:
        raise CheckpointError(
            f"{source}: damaged: expected {record.bytes} bytes with sha256 {record.sha256[:16]}..., "
            f"found {found.bytes} bytes with {found.sha256[:16]}..."
        )


def check_places(path: Path, sources: Iterable[Path]) -> None:
    """Make sure that what is made at `path` has nothing to do with the places of the sources.

    Raises:
        CheckpointError: it and a source lie inside one another.
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
    """Fill a directory aside and give it its name when it is complete; on failure nothing remains.

    The place aside has a name of its own, so nothing that was there before is touched, and of two runs with the same
    `path` the later one fails. What killed runs with this `path` left aside is removed.

    Args:
        path: directory to make.
        sources: what is read meanwhile.

    Raises:
        CheckpointError: `path` exists, also if it came up meanwhile, or it and a source lie inside one another.
    """
    check_target(path, sources)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = make_aside(path)
    try:
        remove_leftovers(path, aside)
        yield aside
        (aside / MAKER_NAME).unlink()
        sync_directory(aside)
        if path.exists():  # a rename would replace an empty directory
            raise CheckpointError(f"{path}: exists already; another run made it meanwhile")
        aside.rename(path)
        sync_directory(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
