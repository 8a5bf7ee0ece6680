"""One header of a tar: 512 bytes with the name, size and kind of the file that follows.

Reads ustar, GNU and PAX headers (POSIX.1-2017 `pax`; GNU tar manual, "Basic Tar Format").
"""

from __future__ import annotations

import posixpath
import re
from typing import NamedTuple

BLOCK = 512
LARGEST_OCTAL = 8**11  # sizes from here on need another notation
ZEROS = bytes(BLOCK)
EXTENSIONS = (b"L", b"K", b"x", b"X", b"g")
_EXTENSION_NAMES = {b"@LongLink": (b"L", b"K"), b"@PaxHeader": (b"x", b"X", b"g")}
_PAX_RECORD = re.compile(rb"([0-9]{1,9}) ([^=\n]+)=")


class TarHeader(NamedTuple):
    """Name, size in bytes, type flag and target of a link, as the plain header has them."""

    name: bytes
    size: int
    kind: bytes
    link: bytes


def parse_header(block: bytes, at: int) -> TarHeader:
    """Parse a block that `is_header` accepts.

    Args:
        block: the header, 512 bytes.
        at: its byte in the tar, for messages.

    Raises:
        ValueError: its size is no number, or it is an extension header under a wrong name.
    """
    name, prefix = block[:100].split(b"\0", 1)[0], block[345:500].split(b"\0", 1)[0]
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    size = _number(block[124:136])
    if size is None:
        raise ValueError(f"size {block[124:136]!r} in the header at byte {at}")
    kind = block[156:157]
    for mark, kinds in _EXTENSION_NAMES.items():
        if (mark in name and kind not in kinds) or (kind in (b"L", b"K") and b"@LongLink" not in name):
            raise ValueError(f"header {decode_name(name)!r} of the wrong type {kind!r} at byte {at}")
    if kind == b"\0" and name.endswith(b"/"):  # before POSIX, a directory was known by its name
        kind = b"5"
    return TarHeader(name, size, kind, block[157:257].split(b"\0", 1)[0])


def parse_pax(payload: bytes, at: int) -> dict[bytes, bytes]:
    """Parse the records `LENGTH KEY=VALUE\\n` of a PAX header at byte `at`.

    Raises:
        ValueError: they are malformed.
    """
    found: dict[bytes, bytes] = {}
    begin = 0
    while begin < len(payload):
        match = _PAX_RECORD.match(payload, begin)
        end = begin + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(payload) or payload[end - 1 : end] != b"\n":
            raise ValueError(f"malformed PAX header at byte {at}")
        found[match[2]] = payload[match.end() : end - 1]
        begin = end
    return found


def is_header(block: bytes) -> bool:
    """Whether a block is a tar header, by its checksum."""
    stored = _number(block[148:156])
    if stored is None or len(block) < BLOCK or block == ZEROS:
        return False
    rest = block[:148] + b"        " + block[156:]
    total = sum(rest)
    # Some old programs added the bytes up as signed numbers.
    return stored == total or stored == total - 256 * sum(byte > 127 for byte in rest)


def normalise_name(name: str) -> str:
    """Return a path as extracting would use it: `./a//b` and `/a/b` are `a/b`."""
    if name.startswith(("/", ".")) or "//" in name or "/." in name:
        name = posixpath.normpath(name).lstrip("/")
    return name


def _number(field: bytes) -> int | None:
    """Read an octal number, or a binary one (GNU); None if it is neither, or negative."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def round_up(value: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-value // multiple) * multiple


def decode_name(name: bytes) -> str:
    """Decode a name; bytes that are not UTF-8 become surrogates."""
    return name.decode("utf-8", "surrogateescape")


def link_target(header: TarHeader, path: bytes, target: str) -> str:
    """Return the path that a link leads to, seen from the root of the tar; empty if it leads out of it.

    A hard link counts from the root of the tar, a symbolic one from its own place.
    """
    if header.kind == b"1":
        return normalise_name(target)
    if target.startswith("/"):
        return ""
    return normalise_name(posixpath.join(posixpath.dirname(normalise_name(decode_name(path))), target))


def is_same_name(header: bytes, path: bytes) -> bool:
    """Whether the plain header may belong to a path that an extension header gives.

    The plain header holds as much of it as fits, as the writers do it: cut (GNU tar), with `?` for what is not ASCII
    (Python), without it (Go), or directory and base name cut on their own (libarchive).
    """
    if header == path:
        return True
    if b"\0" in path:
        return False
    ascii_ = decode_name(path).encode("ascii", "replace")
    forms = (path[:100], path[:99], ascii_[:100], bytes(byte for byte in path if byte < 128)[:100])
    if header in forms:
        return True
    directory, _, base = header.rpartition(b"/")
    of_path, _, base_of_path = path.rpartition(b"/")
    return len(path) > 99 and bool(base) and base_of_path.startswith(base) and of_path.startswith(directory)
