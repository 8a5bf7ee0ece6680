"""The tars of a directory, and files beside them that seem to be shards and are not read."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.runtime.listing import matching_entries
from megatron_qwenvl.runtime.retry import retry_read

_APPLE_DOUBLE = "._"
"""Start of the names of files in which macOS keeps attributes of the file beside them."""
_DECOMPRESSORS = {
    "gz": "gzip -d", "tgz": "gzip -d", "z": "gzip -d", "taz": "gzip -d", "bz2": "bzip2 -d", "tbz": "bzip2 -d",
    "tbz2": "bzip2 -d", "xz": "xz -d", "txz": "xz -d", "lzma": "xz -d", "zst": "zstd -d", "tzst": "zstd -d",
    "lz4": "lz4 -d", "lz": "lzip -d", "tlz": "lzip -d", "lzo": "lzop -d", "br": "brotli -d", "zip": "unzip",
    "7z": "7z x", "rar": "unrar x",
}  # fmt: skip
_COMPRESSED = re.compile(r"(.*)\.(?:tar\.(\w+)|(t\w+))", re.IGNORECASE | re.DOTALL)


def list_shards(directory: Path) -> list[Path]:
    """List the tars of a directory, sorted by name.

    Raises:
        DataError: no such directory, or no tar in it.
    """
    try:
        is_directory, shards = retry_read(
            directory, lambda: (directory.is_dir(), sorted(matching_entries(directory, "*.tar")))
        )
        shards = [shard for shard in shards if not shard.name.startswith(_APPLE_DOUBLE)]
    except OSError as error:
        raise DataError(f"{directory}: cannot be listed: {error.strerror}") from error
    if not is_directory:
        raise DataError(f"{directory}: no such directory of shards")
    if not shards:
        unread = unread_shards(directory)
        raise DataError(next(iter(unread.values()), f"{directory}: no shards (*.tar)"))
    return shards


def unread_shards(directory: Path) -> dict[str, str]:
    """Find files that seem to be shards and are not read; return the reason and the remedy by file name.

    Raises:
        DataError: the directory cannot be read.
    """
    found = {}
    try:
        names = sorted(retry_read(directory, lambda: os.listdir(directory)))
    except OSError as error:
        raise DataError(f"{directory}: cannot be listed: {error.strerror}") from error
    shards = {name for name in names if name.endswith(".tar")}
    for name in names:
        match = _COMPRESSED.fullmatch(name)
        command = _DECOMPRESSORS.get((match[2] or match[3]).lower()) if match else None
        if name.startswith(_APPLE_DOUBLE):
            continue
        if match and command and f"{match[1]}.tar" not in shards:
            found[name] = (
                f"{directory / name}: compressed tars are not read; decompress it ({command}) or move it away"
            )
        elif name.lower().endswith(".tar") and not name.endswith(".tar"):
            found[name] = f"{directory / name}: shards are named *.tar; rename it or move it away"
    return found
