"""WebDataset shards: what a tar holds, and reading one member by its offset."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
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


def read_member(descriptor: int, path: Path, name: str, member: Member) -> bytes:
    """The bytes of one file, after a check that the tar's header says the same as the index.

    Raises:
        DataError: the shard is not the one that was indexed.
    """
    data = os.pread(descriptor, _BLOCK + member.size, member.offset - _BLOCK)
    found = "nothing"
    if len(data) == _BLOCK + member.size:
        try:
            info = tarfile.TarInfo.frombuf(data[:_BLOCK], "utf-8", "surrogateescape")
            found = f"{info.name!r} of {info.size} bytes"
            if info.size == member.size and _same_name(info.name, name):
                return data[_BLOCK:]
        except tarfile.HeaderError:
            found = "no tar header"
    raise DataError(
        f"{path}: the index does not match the shard: expected {name!r} of {member.size} bytes at byte "
        f"{member.offset}, found {found}; run tools/index_shards.py"
    )


def _same_name(found: str, name: str) -> bool:
    """A plain header holds 100 bytes of a name; what is longer or not ASCII stands in an extension before it."""
    header = found.encode("utf-8", "surrogateescape")
    return header in (name.encode(), name.encode()[:100], name.encode("ascii", "replace")[:100])
