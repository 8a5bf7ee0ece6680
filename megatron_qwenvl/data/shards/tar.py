"""Where the bytes of each file of a tar lie, from its headers alone.

Stricter than `tarfile`: a header that is damaged or zeroed in the middle refuses the tar instead of ending it, and a
file whose name or size is stored twice and differently is reported instead of guessed. Reads ustar, GNU and PAX
headers (POSIX.1-2017 `pax`, GNU tar manual "Basic Tar Format").
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_qwenvl.data.errors import DataError

BLOCK = 512
_RECORD = 20 * BLOCK  # to which GNU tar and Python pad the end of an archive
_OTHER_RECORDS = tuple(BLOCK << shift for shift in range(1, 12))  # tar -b
_LARGEST_OCTAL = 8**11  # sizes from here on need another notation
_MAX_EXTENSION = 1 << 20
_BUFFER = 1 << 14
_CHUNK = 1 << 20
_MAGIC = b"ustar"
_ZEROS = bytes(BLOCK)
_PAX_RECORD = re.compile(rb"([0-9]{1,9}) ([^=\n]+)=")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK": "zip",
}
_EXTENSIONS = (b"L", b"K", b"x", b"X", b"g")
_EXTENSION_NAMES = {b"@LongLink": (b"L", b"K"), b"@PaxHeader": (b"x", b"X", b"g")}
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
    """Where the bytes of a file stand in the tar."""

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


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes
    link: bytes


class Tar:
    """The entries of an open tar.

    Attributes:
        joints: bytes at which further tars begin, as far as `entries` has come.
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
        """Every file in the order of the tar, also of several tars one after the other; directories are left out.

        Raises:
            DataError: not a tar, a damaged one, or one that ends early.
            OSError: it cannot be read.
        """
        self._refuse_compressed()
        start: int | None = 0
        at = 0
        while start is not None:
            if self._block(at) == _ZEROS:
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
        """Where another tar begins behind the zeros at `at`; none: the file ends with them.

        Zeros count as an end mark only where an archive that began at `start` can end, so that a part that was
        zeroed is not taken for one.
        """
        data = self._after_zeros(at)
        used = at - start + 2 * BLOCK
        if data is None:
            tail = self._size - at
            ends = {start + _round_up(used, record) for record in (_RECORD, *_OTHER_RECORDS)}
            if tail <= 2 * BLOCK or self._size in ends:
                return None
            raise self._damaged(
                f"the zeros from byte {at} to the end at byte {self._size} are no end mark (if tar wrote it with "
                "another blocking factor, write it again without)"
            )
        if data == start + _round_up(used, _RECORD):
            self.joints.append(data)
            return data
        raise self._damaged(f"the zeros at byte {at} are no end mark, data follow at byte {data}")

    def _after_zeros(self, at: int) -> int | None:
        """The first block from `at` on that is not all zeros."""
        while chunk := os.pread(self._descriptor, _CHUNK, at):
            if rest := chunk.lstrip(b"\0"):
                found = at + len(chunk) - len(rest)
                return found - found % BLOCK
            at += len(chunk)
        return None

    def _read_entry(self, at: int) -> tuple[Entry | None, int]:
        """The file at `at` with the extension headers before it (none: a directory), and where the next one begins."""
        extended: dict[bytes, bytes] = {}
        while True:
            header = self._header(at)
            if header.kind not in _EXTENSIONS:
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
            at += BLOCK + _round_up(header.size, BLOCK)
        return self._file(at, header, self._globals | extended)

    def _file(self, at: int, header: _Header, extended: dict[bytes, bytes]) -> tuple[Entry | None, int]:
        path = extended.get(b"GNU.sparse.name") or extended.get(b"path") or header.name
        size, problem = header.size, ""
        if text := extended.get(b"size"):
            if not text.isdigit() or len(text) > 20:
                raise self._damaged(f"size {text[:20]!r} in the header at byte {at}")
            size = int(text)
            if size != header.size and size < _LARGEST_OCTAL:
                problem = f"is stored with two sizes, {header.size} and {size}"
        body = at + BLOCK
        if header.kind == b"S":
            body, problem = self._after_sparse_map(at), "is stored sparse"
        elif any(key.startswith(b"GNU.sparse.") for key in extended):
            problem = "is stored sparse"
        elif not _same_name(header.name, path):
            raise self._damaged(
                f"the file at byte {at} is stored under two names, {_text(header.name)!r} and {_text(path)!r}"
            )
        after = self._after_data(body, size, header, _text(path))
        link = ""
        if header.kind in (b"1", b"2"):
            link = _target(header, path, _text(extended.get(b"linkpath") or header.link))
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
        return Entry(_text(path), member, link, problem), after

    def _after_data(self, body: int, size: int, header: _Header, name: str) -> int:
        """Where the next header stands."""
        if header.kind in (b"2", b"3", b"4", b"5", b"6"):
            return body
        if header.kind == b"1" and (not size or self._is_header(body) or self._block(body) == _ZEROS):
            return body
        if body + size > self._size:
            raise self._damaged(
                f"expected {size} bytes of {name!r} at byte {body}, the file ends at byte {self._size}"
            )
        return body + _round_up(size, BLOCK)

    def _padding_problem(self, body: int, size: int) -> str:
        """Bytes behind a file up to the next block are zero; others say that its size is wrong."""
        padding = self._bytes(body + size, -size % BLOCK)
        return "is followed by bytes that are not zero: its size may be wrong" if any(padding) else ""

    def _refuse_headers_inside(self, body: int, size: int) -> None:
        """A file that holds headers reaches over other files: its size is wrong, and they would be lost."""
        for begin in range(body, body + size, _CHUNK):
            data = self._bytes(begin, min(_CHUNK, body + size - begin))
            at = data.find(_MAGIC)
            while at >= 0:
                block = at - 257
                if block >= 0 and block % BLOCK == 0 and is_header(data[block : block + BLOCK]):
                    raise self._damaged(f"the {size} bytes at byte {body} reach over other files")
                at = data.find(_MAGIC, at + 1)

    def _after_sparse_map(self, at: int) -> int:
        """Where the data of an old GNU sparse file begin, behind the further blocks of its map."""
        more = self._block(at)[482]
        at += BLOCK
        while more:
            more = self._block(at)[504]
            at += BLOCK
        return at

    def _payload(self, at: int, header: _Header) -> bytes:
        if header.size > _MAX_EXTENSION:
            raise self._damaged(f"extension header of {header.size} bytes at byte {at}")
        payload = self._bytes(at + BLOCK, header.size)
        if len(payload) != header.size:
            raise self._damaged(f"no end mark at byte {at}")
        return payload

    def _pax(self, at: int, payload: bytes) -> dict[bytes, bytes]:
        """The records `LENGTH KEY=VALUE\\n` of a PAX header."""
        found: dict[bytes, bytes] = {}
        begin = 0
        while begin < len(payload):
            match = _PAX_RECORD.match(payload, begin)
            end = begin + int(match[1]) if match else 0
            if not match or not match.end() < end <= len(payload) or payload[end - 1 : end] != b"\n":
                raise self._damaged(f"malformed PAX header at byte {at}")
            found[match[2]] = payload[match.end() : end - 1]
            begin = end
        return found

    def _header(self, at: int) -> _Header:
        block = self._block(at)
        if not self._is_header(at):
            raise self._damaged(f"no tar header at byte {at}")
        name, prefix = block[:100].split(b"\0", 1)[0], block[345:500].split(b"\0", 1)[0]
        if prefix and block[257:263] == b"ustar\0":
            name = prefix + b"/" + name
        size = _number(block[124:136])
        if size is None:
            raise self._damaged(f"size {block[124:136]!r} in the header at byte {at}")
        kind = block[156:157]
        for mark, kinds in _EXTENSION_NAMES.items():
            if (mark in name and kind not in kinds) or (kind in (b"L", b"K") and b"@LongLink" not in name):
                raise self._damaged(f"header {_text(name)!r} of the wrong type {kind!r} at byte {at}")
        if kind == b"\0" and name.endswith(b"/"):  # before POSIX, a directory was told by its name
            kind = b"5"
        return _Header(name, size, kind, block[157:257].split(b"\0", 1)[0])

    def _is_header(self, at: int) -> bool:
        return is_header(self._bytes(at, BLOCK))

    def _block(self, at: int) -> bytes:
        block = self._bytes(at, BLOCK)
        if len(block) < BLOCK:
            raise self._damaged(f"no end mark at byte {at}")
        return block

    def _bytes(self, at: int, count: int) -> bytes:
        """`count` bytes from `at` on, fewer at the end of the file."""
        begin = at - self._buffer_at
        if begin < 0 or begin + count > len(self._buffer):
            self._buffer = os.pread(self._descriptor, max(count, _BUFFER), at)
            self._buffer_at, begin = at, 0
        return self._buffer[begin : begin + count]

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self._path}: damaged or truncated tar: {what}")


def is_header(block: bytes) -> bool:
    """Whether a block is a tar header: its checksum says so."""
    stored = _number(block[148:156])
    if stored is None or len(block) < BLOCK or block == _ZEROS:
        return False
    rest = block[:148] + b"        " + block[156:]
    total = sum(rest)
    # Some old programs added the bytes up as signed numbers.
    return stored == total or stored == total - 256 * sum(byte > 127 for byte in rest)


def normalise_name(name: str) -> str:
    """A path as extracting would use it: `./a//b` and `/a/b` are `a/b`."""
    if name.startswith(("/", ".")) or "//" in name or "/." in name:
        name = posixpath.normpath(name).lstrip("/")
    return name


def _number(field: bytes) -> int | None:
    """An octal number, or a binary one (GNU); none if it is neither, or negative."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _target(header: _Header, path: bytes, target: str) -> str:
    """The path that a link means: a hard link counts from the root of the tar, a symbolic one from its own place."""
    if header.kind == b"1":
        return normalise_name(target)
    if target.startswith("/"):
        return ""
    return normalise_name(posixpath.join(posixpath.dirname(normalise_name(_text(path))), target))


def _same_name(header: bytes, path: bytes) -> bool:
    """Whether the plain header may belong to a path that an extension header gives.

    The plain header holds as much of it as fits, as the writers do it: cut (GNU tar), with `?` for what is not ASCII
    (Python), without it (Go), or directory and base name cut on their own (libarchive).
    """
    if header == path:
        return True
    if b"\0" in path:
        return False
    ascii_ = _text(path).encode("ascii", "replace")
    forms = (path[:100], path[:99], ascii_[:100], bytes(byte for byte in path if byte < 128)[:100])
    if header in forms:
        return True
    directory, _, base = header.rpartition(b"/")
    of_path, _, base_of_path = path.rpartition(b"/")
    return len(path) > 99 and bool(base) and base_of_path.startswith(base) and of_path.startswith(directory)
