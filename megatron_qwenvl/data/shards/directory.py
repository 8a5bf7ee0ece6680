"""An opened directory of indexed shards, and the checks made when it is opened for training."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.runtime.retry import retry_read

from .catalog import CATALOG_NAME, ShardCatalog, load_catalog
from .index import ShardIndex, file_digest, index_command, load_index
from .listing import list_shards, unread_shards
from .skipped import commonest


@dataclass(frozen=True)
class ShardDirectory:
    """An opened directory of shards. Small, and holds nothing that cannot be sent to another process."""

    path: Path
    catalog: ShardCatalog
    vocabulary: str | None = None
    """The tokenizer's file, for the commands that messages name."""
    modified: tuple[str, ...] = ()
    """Shards whose modification time is not that of when they were indexed, although their size is."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Samples of each shard, int64 `[shards]`."""
        return np.array([shard.samples for shard in self.catalog.shards], dtype=np.int64)

    def shard_path(self, shard: int) -> Path:
        """Path of a shard."""
        return self.path / self.catalog.shards[shard].name

    def load_index(self, shard: int) -> ShardIndex:
        """Read the index of a shard.

        Raises:
            DataError: it is missing, damaged, or not the one that the catalog was made from.
        """
        path = self.shard_path(shard)
        index = load_index(path, self.vocabulary)
        entry = self.catalog.shards[shard]
        expected = entry.digest, self.catalog.tokenizer, self.catalog.options
        if (index.digest, index.tokenizer, index.options) != expected:
            raise DataError(f"{path}: index and manifest differ; run {self.index_command()}")
        return index

    def check_size(self, shard: int) -> bool:
        """Compare the size of a shard with that in the catalog.

        Returns:
            Whether its modification time is still the same.

        Raises:
            DataError: the size differs, or the shard cannot be read.
        """
        path, entry = self.shard_path(shard), self.catalog.shards[shard]
        try:
            found = retry_read(path, lambda: os.stat(path), folder=path.parent)
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
        """Describe the shards that were modified since they were indexed in one line; None if there are none."""
        if not self.modified:
            return None
        named = ", ".join(self.modified[:3]) + (", ..." if len(self.modified) > 3 else "")
        return (
            f"{self.path}: {len(self.modified)} of {len(self.catalog.shards)} shards have another modification time "
            f"than when they were indexed ({named}); if they are not merely copies: run {self.index_command()}"
        )

    def check_digest(self, shard: int) -> None:
        """Read a shard and compare its digest with that in the catalog.

        Raises:
            DataError: the digest differs, or the shard cannot be read.
        """
        path, expected = self.shard_path(shard), self.catalog.shards[shard].digest
        try:
            digest = retry_read(path, lambda: _digest_of(path))
        except OSError as error:
            raise DataError(f"{path}: cannot read the shard: {error.strerror}") from error
        if digest != expected:
            raise DataError(
                f"{path}: expected digest {expected} as indexed, found {digest}; restore the shard, or run "
                f"{self.index_command('--force')}"
            )

    def index_command(self, *options: str) -> str:
        """Write the command that indexes this directory for the run's tokenizer."""
        return index_command(self.path, self.vocabulary, *options)


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file)


def open_directory(
    path: Path, tokenizer: str, verify_digests: bool = False, vocabulary: str | None = None
) -> ShardDirectory:
    """Open a directory after comparing its catalog with its shards.

    Args:
        path: the directory.
        tokenizer: fingerprint of the tokenizer in use.
        verify_digests: read every shard and compare its digest (slow).
        vocabulary: the tokenizer's file, for the commands that messages name.

    Raises:
        DataError: no catalog; a shard missing, of another size or digest, or not indexed; indexed with
            another tokenizer or by another version; no usable sample.
    """
    shards = {shard.name: shard for shard in list_shards(path)}
    remedy = f"run {index_command(path, vocabulary)}"
    catalog = load_catalog(path, remedy)
    if catalog.tokenizer != tokenizer:
        raise DataError(
            f"{path / CATALOG_NAME}: indexed with another tokenizer (expected {tokenizer}, found "
            f"{catalog.tokenizer}); {remedy}"
        )
    for unread in unread_shards(path).values():
        raise DataError(f"{unread}, then {remedy}")
    unknown = sorted(shards.keys() - {entry.name for entry in catalog.shards})
    if unknown:
        if reason := catalog.failed.get(unknown[0]):
            raise DataError(f"{reason}; replace the shard or move it away, then {remedy}")
        raise DataError(f"{shards[unknown[0]]}: shard is not in {CATALOG_NAME}; {remedy}")
    directory = ShardDirectory(path, catalog, vocabulary)
    modified = []
    for number, entry in enumerate(catalog.shards):
        if not directory.check_size(number):
            modified.append(entry.name)
        if verify_digests:
            directory.check_digest(number)
    if not any(entry.samples for entry in catalog.shards):
        reasons = commonest(catalog.skipped) or "the shards are empty"
        raise DataError(f"{path / CATALOG_NAME}: no usable sample in {len(shards)} shards: {reasons}")
    return replace(directory, modified=tuple(modified))
