"""WebDataset shards: what a tar holds, and reading one member by its offset."""

from __future__ import annotations

import functools
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from .errors import DataError

_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Member:
    """Where the bytes of a file stand in the tar."""

    offset: int
    size: int


@dataclass
class ShardSample:
    """Consecutive files with one key: what stands before the first dot of the base name.

    Attributes:
        key: directory and base name without suffixes, `shapes/000017`.
        members: by suffix (`json`, `jpg`, `0.png`).
        duplicate: a suffix that occurs twice, if any.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    duplicate: str | None = None


def scan_shard(file: BinaryIO, path: Path) -> Iterator[ShardSample]:
    """The samples of a tar in its order.

    Raises:
        DataError: not a tar, or one that ends early.
    """
    current: ShardSample | None = None
    for name, member in _files(file, path):
        key, suffix = split_name(name)
        if not suffix:
            continue
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = ShardSample(key)
        if suffix in current.members:
            current.duplicate = suffix
        current.members[suffix] = member
    if current is not None:
        yield current


def split_name(name: str) -> tuple[str, str]:
    """`a/b.0.jpg` to `("a/b", "0.jpg")`, as webdataset splits names."""
    directory, base = os.path.split(name)
    stem, _, suffix = base.partition(".")
    return os.path.join(directory, stem), suffix


def _files(file: BinaryIO, path: Path) -> Iterator[tuple[str, Member]]:
    """Regular files of a tar that is complete to its end mark."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                if info.isreg():
                    yield info.name, Member(info.offset_data, info.size)
                tar.members.clear()  # type: ignore[attr-defined]  # else the headers of the whole shard pile up
            end = tar.offset
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged or truncated tar: {error}") from error
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):  # tarfile takes a tar cut between two members for a whole one
        raise DataError(f"{path}: damaged or truncated tar: no end mark at byte {end}")


def checksum(pieces: Iterable[bytes]) -> int:
    """CRC-32 of bytes that come one after the other."""
    return functools.reduce(lambda crc, piece: zlib.crc32(piece, crc), pieces, 0)


def read_member(descriptor: int, member: Member) -> bytes:
    """The bytes of one file of a tar; fewer where the tar ends before.

    Raises:
        OSError: it cannot be read.
    """
    return os.pread(descriptor, member.size, member.offset)
