"""The place of each file in a tar, from its headers alone.

Stricter than `tarfile`: a tar with a header that is damaged or zeroed in the middle is refused instead of ending there,
and a file whose name or size is stored twice and differently is reported instead of guessed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_qwenvl.data.errors import DataError

from .tar_header import (
    BLOCK,
    EXTENSIONS,
    LARGEST_OCTAL,
    ZEROS,
    TarHeader,
    decode_name,
    is_header,
    is_same_name,
    link_target,
    parse_header,
    parse_pax,
    round_up,
)

_RECORD = 20 * BLOCK  # to which GNU tar and Python pad the end of an archive
_OTHER_RECORDS = tuple(BLOCK << shift for shift in range(1, 12))  # tar -b
_MAX_EXTENSION = 1 << 20
_BUFFER = 1 << 14
_CHUNK = 1 << 20
_MAGIC = b"ustar"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK": "zip",
}
_KINDS = {
    b"3": "a device",
    b"4": "a device",
    b"5": "a directory",
    b"6": "a pipe",
    b"V": "a label",
    b"M": "part of a file",
}


@dataclass(frozen=True, slots=True)
class Member:
    """Place of a file in the tar: its first byte, and its length in bytes."""

    offset: int
    size: int


class Entry(NamedTuple):
    """One file of a tar.

    Attributes:
        name: its path as stored; bytes that are not UTF-8 are surrogates.
        member: its bytes; none: it is a link, or cannot be used.
        link: path of the file that holds its bytes; relative to the root of the tar.
        problem: why it cannot be used.
    """

    name: str
    member: Member | None = None
    link: str = ""
    problem: str = ""


class Tar:
    """The entries of an open tar.

    Attributes:
        joints: bytes at which further tars begin, up to where `entries` has read.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self._size = os.fstat(descriptor).st_size
        self._buffer = b""
        self._buffer_at = 0
        self._globals: dict[bytes, bytes] = {}
        self.joints: list[int] = []

    def entries(self) -> Iterator[Entry]:
        """Yield every file in the order of the tar, also of several tars joined by `cat`; directories are left out.

        Raises:
            DataError: not a tar, a damaged one, or one that ends early.
            OSError: it cannot be read.
        """
        self._refuse_compressed()
        start: int | None = 0
        at = 0
        while start is not None:
            if self._block(at) == ZEROS:
                start = self._next_archive(start, at)
                at = start or 0
            else:
                entry, at = self._read_entry(at)
                if entry:
                    yield entry

    def _refuse_compressed(self) -> None:
        first = self._bytes(0, 8)
        if not first:
            raise self._damaged("the file is empty")
        for magic, kind in _COMPRESSED.items():
            if first.startswith(magic) and not self._is_header(0):
                raise DataError(
                    f"{self._path}: expected a plain tar, found {kind}, which is to be decompressed"
                )

    def _next_archive(self, start: int, at: int) -> int | None:
        """Find where another tar begins after the zeros at `at`; None: the file ends with them.

        Zeros count as an end mark only where an archive that began at `start` can end, so that a part that was
        zeroed is not taken for one.
        """
        data = self._after_zeros(at)
        used = at - start + 2 * BLOCK
        if data is None:
            tail = self._size - at
            ends = {start + round_up(used, record) for record in (_RECORD, *_OTHER_RECORDS)}
            if tail <= 2 * BLOCK or self._size in ends:
                return None
            raise self._damaged(
                f"the zeros from byte {at} to the end at byte {self._size} are no end mark (if tar wrote it with "
                "another blocking factor, write it again without)"
            )
        if data == start + round_up(used, _RECORD):
            self.joints.append(data)
            return data
        raise self._damaged(f"the zeros at byte {at} are no end mark, data follow at byte {data}")

    def _after_zeros(self, at: int) -> int | None:
        """Find the first block from `at` on that is not all zeros."""
        while chunk := os.pread(self._descriptor, _CHUNK, at):
            if rest := chunk.lstrip(b"\0"):
                found = at + len(chunk) - len(rest)
                return found - found % BLOCK
            at += len(chunk)
        return None

    def _read_entry(self, at: int) -> tuple[Entry | None, int]:
        """Read the file at `at` with its extension headers (None: a directory), and where the next one begins."""
        extended: dict[bytes, bytes] = {}
        while True:
            header = self._header(at)
            if header.kind not in EXTENSIONS:
                break
            payload = self._payload(at, header)
            if header.kind in (b"L", b"K"):
                name = payload.rstrip(b"\0")
                if not name or b"\0" in name:
                    raise self._damaged(f"no name in the header at byte {at}")
                extended[b"path" if header.kind == b"L" else b"linkpath"] = name
            else:
                records = self._pax(at, payload)
                if header.kind == b"g" and records.keys() & {b"path", b"linkpath", b"size"}:
                    raise self._damaged(f"the header at byte {at} names one file and is meant for all")
                (self._globals if header.kind == b"g" else extended).update(records)
            at += BLOCK + round_up(header.size, BLOCK)
        return self._file(at, header, self._globals | extended)

    def _file(self, at: int, header: TarHeader, extended: dict[bytes, bytes]) -> tuple[Entry | None, int]:
        path = extended.get(b"GNU.sparse.name") or extended.get(b"path") or header.name
        size, problem = header.size, ""
        if text := extended.get(b"size"):
            if not text.isdigit() or len(text) > 20:
                raise self._damaged(f"size {text[:20]!r} in the header at byte {at}")
            size = int(text)
            if size != header.size and size < LARGEST_OCTAL:
                problem = f"is stored with two sizes, {header.size} and {size}"
        body = at + BLOCK
        if header.kind == b"S":
            body, problem = self._after_sparse_map(at), "is stored sparse"
        elif any(key.startswith(b"GNU.sparse.") for key in extended):
            problem = "is stored sparse"
        elif not is_same_name(header.name, path):
            raise self._damaged(
                f"the file at byte {at} is stored under two names, {decode_name(header.name)!r} and "
                f"{decode_name(path)!r}"
            )
        after = self._after_data(body, size, header, decode_name(path))
        link = ""
        if header.kind in (b"1", b"2"):
            link = link_target(header, path, decode_name(extended.get(b"linkpath") or header.link))
        elif b"linkpath" in extended:
            raise self._damaged(f"the file at byte {at} has the target of a link and is none")
        elif header.kind in (b"0", b"\0", b"7"):
            problem = problem or self._padding_problem(body, size)
            if size > BLOCK and not path.endswith(b".tar"):
                self._refuse_headers_inside(body, size)
        elif (header.kind == b"V" and not size) or (header.kind == b"5" and path.endswith(b"/")):
            return None, after
        elif header.kind != b"S":
            problem = f"is {_KINDS.get(header.kind, f'of the unknown type {header.kind!r}')}, not a file"
        member = None if problem or header.kind in (b"1", b"2") else Member(body, size)
        return Entry(decode_name(path), member, link, problem), after

    def _after_data(self, body: int, size: int, header: TarHeader, name: str) -> int:
        """Return the byte of the next header."""
        if header.kind in (b"2", b"3", b"4", b"5", b"6"):
            return body
        if header.kind == b"1" and (not size or self._is_header(body) or self._block(body) == ZEROS):
            return body
        if body + size > self._size:
            raise self._damaged(
                f"expected {size} bytes of {name!r} at byte {body}, the file ends at byte {self._size}"
            )
        return body + round_up(size, BLOCK)

    def _padding_problem(self, body: int, size: int) -> str:
        """Check that the bytes from the end of a file to the next block are zero, as they are if its size is right."""
        padding = self._bytes(body + size, -size % BLOCK)
        return "is followed by bytes that are not zero: its size may be wrong" if any(padding) else ""

    def _refuse_headers_inside(self, body: int, size: int) -> None:
        """Refuse a file that holds headers: its size is wrong, and the files that it reaches over would be lost."""
        for begin in range(body, body + size, _CHUNK):
            data = self._bytes(begin, min(_CHUNK, body + size - begin))
            at = data.find(_MAGIC)
            while at >= 0:
                block = at - 257
                if block >= 0 and block % BLOCK == 0 and is_header(data[block : block + BLOCK]):
                    raise self._damaged(f"the {size} bytes at byte {body} reach over other files")
                at = data.find(_MAGIC, at + 1)

    def _after_sparse_map(self, at: int) -> int:
        """Return the byte at which the data of an old GNU sparse file begin, after the further blocks of its map."""
        more = self._block(at)[482]
        at += BLOCK
        while more:
            more = self._block(at)[504]
            at += BLOCK
        return at

    def _payload(self, at: int, header: TarHeader) -> bytes:
        if header.size > _MAX_EXTENSION:
            raise self._damaged(f"extension header of {header.size} bytes at byte {at}")
        payload = self._bytes(at + BLOCK, header.size)
        if len(payload) != header.size:
            raise self._damaged(f"no end mark at byte {at}")
        return payload

    def _header(self, at: int) -> TarHeader:
        block = self._block(at)
        if not is_header(block):
            raise self._damaged(f"no tar header at byte {at}")
        try:
            return parse_header(block, at)
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def _pax(self, at: int, payload: bytes) -> dict[bytes, bytes]:
        try:
            return parse_pax(payload, at)
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def _is_header(self, at: int) -> bool:
        return is_header(self._bytes(at, BLOCK))

    def _block(self, at: int) -> bytes:
        block = self._bytes(at, BLOCK)
        if len(block) < BLOCK:
            raise self._damaged(f"no end mark at byte {at}")
        return block

    def _bytes(self, at: int, count: int) -> bytes:
        """Read `count` bytes from `at` on, fewer at the end of the file."""
        begin = at - self._buffer_at
        if begin < 0 or begin + count > len(self._buffer):
            self._buffer = os.pread(self._descriptor, max(count, _BUFFER), at)
            self._buffer_at, begin = at, 0
        return self._buffer[begin : begin + count]

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self._path}: damaged or truncated tar: {what}")
