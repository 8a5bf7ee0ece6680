"""A directory of indexed shards: its manifest, and the checks made when it is opened for training.

The manifest (`manifest.json`) repeats the few numbers that a start needs, so that opening 30,000 shards reads
one file and lists one directory instead of reading 30,000 indices.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import DataError
from .index import FORMAT_VERSION, ShardIndex, file_digest, load_index, write_atomically

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest; fields as in `ShardIndex`."""

    name: str
    size: int
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
            index.digest,
            len(index),
            len(arrays["widths"]),
            len(arrays["skipped_keys"]),
        )


@dataclass(frozen=True)
class Manifest:
    """The shards of a directory in the order of their names, and the tokenizer that counted their text."""

    tokenizer: str
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class ShardDirectory:
    """An opened directory of shards; small, and carries nothing that cannot be sent to another process."""

    path: Path
    manifest: Manifest

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
        index = load_index(self.shard_path(shard))
        if index.digest != self.manifest.shards[shard].digest or index.tokenizer != self.manifest.tokenizer:
            raise DataError(f"{self.shard_path(shard)}: index and manifest differ; run tools/index_shards.py")
        return index


def list_shards(directory: Path) -> list[Path]:
    """The tars of a directory, sorted by name.

    Raises:
        DataError: no such directory, or no tar in it.
    """
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory of shards")
    shards = sorted(directory.glob("*.tar"))
    if not shards:
        raise DataError(f"{directory}: no shards (*.tar)")
    return shards


def save_manifest(manifest: Manifest, directory: Path) -> None:
    """Write the manifest, whole or not at all."""
    content = {"format": FORMAT_VERSION, **asdict(manifest)}
    write_atomically(directory / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def open_directory(path: Path, tokenizer: str, verify_digests: bool = False) -> ShardDirectory:
    """Open a directory after checks of the manifest against the shards.

    Args:
        path: the directory.
        tokenizer: fingerprint of the tokenizer in use.
        verify_digests: read every shard and compare its digest (slow).

    Raises:
        DataError: no manifest; a shard missing, of another size or digest, or not indexed; indexed with
            another tokenizer; no usable sample.
    """
    shards = {shard.name: shard for shard in list_shards(path)}
    manifest = _load_manifest(path)
    if manifest.tokenizer != tokenizer:
        raise DataError(
            f"{path / MANIFEST}: indexed with another tokenizer (expected {tokenizer}, found "
            f"{manifest.tokenizer}); run tools/index_shards.py with the tokenizer of the run"
        )
    unknown = sorted(shards.keys() - {entry.name for entry in manifest.shards})
    if unknown:
        raise DataError(f"{shards[unknown[0]]}: shard is not in {MANIFEST}; run tools/index_shards.py {path}")
    for entry in manifest.shards:
        _check_shard(path / entry.name, entry, verify_digests)
    if not any(entry.samples for entry in manifest.shards):
        raise DataError(f"{path / MANIFEST}: no usable sample in {len(shards)} shards")
    return ShardDirectory(path, manifest)


def _check_shard(path: Path, entry: ShardEntry, verify_digest: bool) -> None:
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise DataError(f"{path}: shard of the manifest cannot be read: {error.strerror}") from error
    if size != entry.size:
        raise DataError(
            f"{path}: expected {entry.size} bytes as indexed, found {size}; run tools/index_shards.py"
        )
    if verify_digest:
        with path.open("rb") as file:
            digest = file_digest(file)
        if digest != entry.digest:
            raise DataError(f"{path}: expected digest {entry.digest} as indexed, found {digest}")


def _load_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        version = content.pop("format")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: expected manifest format {FORMAT_VERSION}, found {version}")
        shards = tuple(ShardEntry(**entry) for entry in content["shards"])
        return Manifest(content["tokenizer"], shards)
    except FileNotFoundError:
        raise DataError(f"{path}: no manifest; run tools/index_shards.py {directory}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: damaged manifest: {error}; run tools/index_shards.py {directory}"
        ) from error
