"""The samples of a WebDataset shard, each a group of files in a tar, and reading one file by its offset."""

from __future__ import annotations

import functools
import os
import posixpath
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from megatron_qwenvl.runtime.retry import read_at

from .tar import Entry, Member, Tar
from .tar_header import normalise_name

MAX_MEMBER = 1 << 29
"""Largest file of a sample in bytes: what is read at once."""
_MAX_NAME = 1000
_SYSTEM_FILES = ("thumbs.db", "desktop.ini")


@dataclass(slots=True)
class ShardSample:
    """The files of a shard with one key: what stands before the first dot of the base name.

    Attributes:
        key: directory and base name without suffixes, `shapes/000017`; the whole name of a file that belongs to no
            sample.
        members: by suffix (`json`, `jpg`, `0.png`).
        problem: why it cannot be used, whatever its files hold.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    problem: str = ""

    def add(self, suffix: str, member: Member) -> None:
        """Add a file; a second one of the same suffix is a problem."""
        if suffix in self.members:
            self.problem = self.problem or f"two files named .{suffix}"
        elif member.size > MAX_MEMBER:
            self.problem = self.problem or f".{suffix} has {member.size} bytes, at most {MAX_MEMBER} are read"
        self.members[suffix] = member


def scan_shard(file: BinaryIO, path: Path, joints: list[int] | None = None) -> Iterator[ShardSample]:
    """Yield the samples of a tar in the order of their first files, then the files that belong to none.

    The files of a sample may stand anywhere in the tar. Links are followed to the file that holds the bytes.

    Args:
        file: the open tar.
        path: its path, for messages.
        joints: gets the bytes at which further tars begin, joined to the first one by `cat`.

    Raises:
        DataError: not a tar, a damaged one, or one that ends early.
        OSError: it cannot be read.
    """
    samples: dict[str, ShardSample] = {}
    strays: list[ShardSample] = []
    files: dict[str, Member | None] = {}  # None: a name that occurs twice, so a link to it means neither
    links: list[tuple[ShardSample, str, Entry]] = []
    tar = Tar(file.fileno(), path)
    for entry in tar.entries():
        name = normalise_name(entry.name)
        if entry.member:
            files[name] = None if name in files else entry.member
        if problem := _name_problem(name):
            strays.append(ShardSample(name, problem=problem))
            continue
        key, suffix = split_name(name)
        sample = samples.get(key)
        if sample is None:
            sample = samples[key] = ShardSample(key)
        sample.problem = sample.problem or _unusable_name(name)
        if entry.problem:
            sample.problem = sample.problem or f".{suffix} {entry.problem}"
        elif entry.member:
            sample.add(suffix, entry.member)
        else:
            links.append((sample, suffix, entry))
    if joints is not None:
        joints += tar.joints
    _resolve(links, files)
    for sample in samples.values():
        if len({suffix.lower() for suffix in sample.members}) < len(sample.members):
            sample.problem = sample.problem or f"file names differ in case only: {', '.join(sample.members)}"
    yield from samples.values()
    yield from strays


def _name_problem(name: str) -> str:
    """Explain why a file belongs to no sample; empty if it may."""
    directory, base = posixpath.split(name)
    if base.startswith("._") or directory.split("/", 1)[0] == "__MACOSX":
        return "a companion file of macOS, not a sample"
    if base.startswith(".") or base.lower() in _SYSTEM_FILES:
        return "a hidden file, not a sample"
    if "." not in base:
        return "a file without a suffix belongs to no sample"
    return ""


def _unusable_name(name: str) -> str:
    """Explain why a sample with a file of this name cannot be used; empty if it can."""
    if len(name) > _MAX_NAME:
        return f"a file name of more than {_MAX_NAME} characters"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "a file name is not UTF-8"
    return ""


def _resolve(links: list[tuple[ShardSample, str, Entry]], files: dict[str, Member | None]) -> None:
    """Give each link the bytes that it leads to, perhaps over other links."""
    targets = {normalise_name(entry.name): entry.link for _, _, entry in links}
    for sample, suffix, entry in links:
        target, seen = entry.link, set[str]()
        while target not in files and target in targets and target not in seen:
            seen.add(target)
            target = targets[target]
        if member := files.get(target):
            sample.add(suffix, member)
        else:
            sample.problem = (
                sample.problem or f".{suffix} is a link to {entry.link!r}, which is no file of the shard"
            )


def split_name(name: str) -> tuple[str, str]:
    """Split `a/b.0.jpg` into `("a/b", "0.jpg")`, as webdataset does."""
    directory, base = os.path.split(name)
    stem, _, suffix = base.partition(".")
    return os.path.join(directory, stem), suffix


def checksum(pieces: Iterable[bytes]) -> int:
    """Compute the CRC-32 of pieces that follow one another."""
    return functools.reduce(lambda crc, piece: zlib.crc32(piece, crc), pieces, 0)


def read_member(descriptor: int, member: Member) -> bytes:
    """Read the bytes of one file of a tar; fewer where the tar ends before.

    Raises:
        OSError: it cannot be read.
    """
    return read_at(descriptor, member.size, member.offset)
