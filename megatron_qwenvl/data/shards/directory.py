"""A directory of indexed shards: its manifest, and the checks made when it is opened for training.

The manifest (`manifest.json`) repeats the few numbers that a start needs, so that opening 30,000 shards reads
one file and lists one directory instead of reading 30,000 indices.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_qwenvl.data.errors import DataError, index_command
from megatron_qwenvl.data.rendering.renderer import RENDERING_VERSION
from megatron_qwenvl.data.rendering.token_builder import DEFAULT_OPTIONS, RenderOptions
from megatron_qwenvl.runtime.listing import matching_entries
from megatron_qwenvl.runtime.retry import reads

from .index import FORMAT_VERSION, ShardIndex, check_versions, file_digest, load_index, write_atomically
from .skipped import SkippedKind, commonest

MANIFEST = "manifest.json"
_APPLE_DOUBLE = "._"
"""Begins the names of files in which macOS keeps attributes of the file beside them."""
_DECOMPRESSORS = {
    "gz": "gzip -d", "tgz": "gzip -d", "z": "gzip -d", "taz": "gzip -d", "bz2": "bzip2 -d", "tbz": "bzip2 -d",
    "tbz2": "bzip2 -d", "xz": "xz -d", "txz": "xz -d", "lzma": "xz -d", "zst": "zstd -d", "tzst": "zstd -d",
    "lz4": "lz4 -d", "lz": "lzip -d", "tlz": "lzip -d", "lzo": "lzop -d", "br": "brotli -d", "zip": "unzip",
    "7z": "7z x", "rar": "unrar x",
}  # fmt: skip
_COMPRESSED = re.compile(r"(.*)\.(?:tar\.(\w+)|(t\w+))", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest; fields as in `ShardIndex`."""

    name: str
    size: int
    modified: int
    digest: str
    samples: int
    images: int
    skipped: int

    @classmethod
    def of(cls, index: ShardIndex) -> ShardEntry:
        """The entry of an index."""
        arrays = index.arrays
        return cls(
            index.shard,
            index.size,
            index.modified,
            index.digest,
            len(index),
            len(arrays["widths"]),
            len(arrays["skipped_keys"]),
        )


@dataclass(frozen=True)
class Manifest:
    """The shards of a directory.

    Attributes:
        tokenizer: fingerprint of the tokenizer that counted their text.
        shards: in the order of their names.
        skipped: why samples were left out, the commonest kind first.
        failed: shards that could not be indexed, with the reason.
        options: how their records were rendered where there is a choice; a run renders them in the same way.
        noted: images whose pixels may differ from what another viewer shows, the commonest kind first.
    """

    tokenizer: str
    shards: tuple[ShardEntry, ...]
    skipped: tuple[SkippedKind, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    options: RenderOptions = DEFAULT_OPTIONS
    noted: tuple[SkippedKind, ...] = ()


@dataclass(frozen=True)
class ShardDirectory:
    """An opened directory of shards; small, and carries nothing that cannot be sent to another process."""

    path: Path
    manifest: Manifest
    vocabulary: str | None = None
    """The tokenizer's file, for the commands that messages name."""
    modified: tuple[str, ...] = ()
    """Shards whose modification time is not that of when they were indexed, although their size is."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Samples of each shard."""
        return np.array([shard.samples for shard in self.manifest.shards], dtype=np.int64)

    def shard_path(self, shard: int) -> Path:
        """Path of a shard's tar."""
        return self.path / self.manifest.shards[shard].name

    def load_index(self, shard: int) -> ShardIndex:
        """Read the index of a shard.

        Raises:
            DataError: it is missing, damaged, or not the one that the manifest was made from.
        """
        path = self.shard_path(shard)
        index = load_index(path, self.vocabulary)
        manifest = self.manifest
        expected = manifest.shards[shard].digest, manifest.tokenizer, manifest.options
        if (index.digest, index.tokenizer, index.options) != expected:
            raise DataError(f"{path}: index and manifest differ; run {self.index_command()}")
        return index

    def check_size(self, shard: int) -> bool:
        """Make sure that a shard is as long as it was when it was indexed.

        Returns:
            Whether it was not modified since.

        Raises:
            DataError: it is not, or cannot be read.
        """
        path, entry = self.shard_path(shard), self.manifest.shards[shard]
        try:
            found = reads(path, lambda: os.stat(path), folder=path.parent)
        except OSError as error:
            raise DataError(
                f"{path}: shard of the manifest cannot be read: {error.strerror}; restore it, or go on without it: "
                f"run {self.index_command()}"
            ) from error
        if found.st_size != entry.size:
            raise DataError(
                f"{path}: expected {entry.size} bytes as indexed, found {found.st_size}; run {self.index_command()}"
            )
        return found.st_mtime_ns == entry.modified

    def modified_line(self) -> str | None:
        """What there is to say about shards that were modified since they were indexed, or None."""
        if not self.modified:
            return None
        named = ", ".join(self.modified[:3]) + (", ..." if len(self.modified) > 3 else "")
        return (
            f"{self.path}: {len(self.modified)} of {len(self.manifest.shards)} shards have another modification time "
            f"than when they were indexed ({named}); if they are not merely copies: run {self.index_command()}"
        )

    def check_digest(self, shard: int) -> None:
        """Read a shard and compare its digest.

        Raises:
            DataError: it is another one, or the shard cannot be read.
        """
        path, expected = self.shard_path(shard), self.manifest.shards[shard].digest
        try:
            digest = reads(path, lambda: _digest_of(path))
        except OSError as error:
            raise DataError(f"{path}: cannot read the shard: {error.strerror}") from error
        if digest != expected:
            raise DataError(
                f"{path}: expected digest {expected} as indexed, found {digest}; restore the shard, or run "
                f"{self.index_command('--force')}"
            )

    def index_command(self, *options: str) -> str:
        """The command that indexes this directory as the run needs it."""
        return index_command(self.path, self.vocabulary, *options)


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file)


def list_shards(directory: Path) -> list[Path]:
    """The tars of a directory, sorted by name.

    Raises:
        DataError: no such directory, or no tar in it.
    """
    try:
        is_directory, shards = reads(
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
    """Files of a directory that seem to be shards and are not read, by name with the reason and the way out.

    Raises:
        DataError: the directory cannot be read.
    """
    found = {}
    try:
        names = sorted(reads(directory, lambda: os.listdir(directory)))
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


def failed_shards(directory: Path) -> dict[str, str]:
    """Shards that could not be indexed last time and are still there, by name with the reason; files that seem to be
    shards, too.

    Raises:
        DataError: the directory cannot be read.
    """
    failed: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        failed = dict(json.loads((directory / MANIFEST).read_bytes())["failed"])
    there = {name: reason for name, reason in failed.items() if (directory / name).exists()}
    return {**there, **unread_shards(directory)}


def save_manifest(manifest: Manifest, directory: Path) -> None:
    """Write the manifest, whole or not at all."""
    content = {"format": FORMAT_VERSION, "rendering": RENDERING_VERSION, **asdict(manifest)}
    write_atomically(directory / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def indexed_options(directory: Path) -> RenderOptions:
    """The options with which a directory was indexed last, whichever version did it; the defaults if none did.

    So the command that a message names makes the index anew as its owner wanted it.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return RenderOptions(**json.loads((directory / MANIFEST).read_bytes())["options"])
    for shard in list_shards(directory):  # the manifest is damaged or missing
        with contextlib.suppress(DataError):
            return load_index(shard).options
    return DEFAULT_OPTIONS


def open_directory(
    path: Path, tokenizer: str, verify_digests: bool = False, vocabulary: str | None = None
) -> ShardDirectory:
    """Open a directory after checks of the manifest against the shards.

    Args:
        path: the directory.
        tokenizer: fingerprint of the tokenizer in use.
        verify_digests: read every shard and compare its digest (slow).
        vocabulary: the tokenizer's file, for the commands that messages name.

    Raises:
        DataError: no manifest; a shard missing, of another size or digest, or not indexed; indexed with
            another tokenizer or by another version; no usable sample.
    """
    shards = {shard.name: shard for shard in list_shards(path)}
    remedy = f"run {index_command(path, vocabulary)}"
    manifest = _load_manifest(path, remedy)
    if manifest.tokenizer != tokenizer:
        raise DataError(
            f"{path / MANIFEST}: indexed with another tokenizer (expected {tokenizer}, found "
            f"{manifest.tokenizer}); {remedy}"
        )
    for unread in unread_shards(path).values():
        raise DataError(f"{unread}, then {remedy}")
    unknown = sorted(shards.keys() - {entry.name for entry in manifest.shards})
    if unknown:
        if reason := manifest.failed.get(unknown[0]):
            raise DataError(f"{reason}; replace the shard or move it away, then {remedy}")
        raise DataError(f"{shards[unknown[0]]}: shard is not in {MANIFEST}; {remedy}")
    directory = ShardDirectory(path, manifest, vocabulary)
    modified = []
    for number, entry in enumerate(manifest.shards):
        if not directory.check_size(number):
            modified.append(entry.name)
        if verify_digests:
            directory.check_digest(number)
    if not any(entry.samples for entry in manifest.shards):
        reasons = commonest(manifest.skipped) or "the shards are empty"
        raise DataError(f"{path / MANIFEST}: no usable sample in {len(shards)} shards: {reasons}")
    return replace(directory, modified=tuple(modified))


def _load_manifest(directory: Path, remedy: str) -> Manifest:
    path = directory / MANIFEST
    try:
        content = json.loads(reads(path, path.read_bytes))
        check_versions(path, content["format"], content.get("rendering"), remedy)
        shards = tuple(ShardEntry(**entry) for entry in content["shards"])
        skipped = tuple(SkippedKind(**kind) for kind in content["skipped"])
        noted = tuple(SkippedKind(**kind) for kind in content["noted"])
        options = RenderOptions(**content["options"])
        return Manifest(content["tokenizer"], shards, skipped, dict(content["failed"]), options, noted)
    except FileNotFoundError:
        raise DataError(f"{path}: no manifest; {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged manifest: {error}; {remedy}") from error
