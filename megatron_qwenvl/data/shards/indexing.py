"""Indices of all shards of a directory, built in parallel, and its catalog."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.rendering.token_builder import DEFAULT_OPTIONS, RenderOptions
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer, load_tokenizer

from .catalog import CatalogEntry, ShardCatalog, indexed_options, save_catalog
from .index import ShardIndex, load_index, save_index
from .index_builder import build_index
from .listing import list_shards, unread_shards
from .skipped import SkippedKind, merge, tally


@dataclass(frozen=True)
class IndexJob:
    """Settings for indexing a shard; sent to worker processes."""

    tokenizer: str | None = None
    verify_images: bool = False
    force: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of `RenderOptions` to set; the others stay as when the directory was indexed last."""


@dataclass(frozen=True)
class ShardResult:
    """The outcome for one shard.

    Attributes:
        entry: its line in the catalog; None: it could not be indexed.
        skipped: why samples are left out.
        noted: notes on images.
        fresh: it was indexed now, not before.
        error: why there is no entry.
    """

    entry: CatalogEntry | None = None
    skipped: tuple[SkippedKind, ...] = ()
    noted: tuple[SkippedKind, ...] = ()
    fresh: bool = False
    error: str = ""

    @classmethod
    def of(cls, index: ShardIndex, fresh: bool) -> ShardResult:
        """Summarize an index."""
        skipped = tally(index.shard, index.arrays["skipped_keys"], index.arrays["skipped_reasons"])
        noted = tally(index.shard, index.arrays["noted_keys"], index.arrays["notes"])
        return cls(CatalogEntry.of(index), skipped, noted, fresh)


def index_directory(
    directory: Path,
    job: IndexJob,
    executor: Executor | None = None,
    on_result: Callable[[ShardResult, int], None] | None = None,
) -> list[ShardResult]:
    """Index every shard of a directory and write its catalog; shards whose index is current are left alone.

    A shard that cannot be indexed does not keep the others from being indexed. It is missing from the catalog, so that
    opening the directory names it.

    Args:
        directory: holds `*.tar`.
        job: tokenizer and options.
        executor: indexes shards in parallel (a process pool or mpi4py's); None: one after the other, in this process.
        on_result: called with each result and the number of shards of the directory.

    Raises:
        DataError: no such directory, no shard in it, or no such tokenizer.
    """
    shards = list_shards(directory)
    fingerprint = _tokenizer(job.tokenizer).fingerprint
    options = replace(indexed_options(directory), **job.options)
    index = functools.partial(index_shard, job=job, options=options)
    results = []
    for result in executor.map(index, shards) if executor else map(index, shards):
        results.append(result)
        if on_result:
            on_result(result, len(shards))
    failed = {shard.name: result.error for shard, result in zip(shards, results, strict=True) if result.error}
    for name, reason in unread_shards(directory).items():
        failed[name] = reason
        results.append(ShardResult(error=reason))
        if on_result:
            on_result(results[-1], len(results))
    entries = tuple(result.entry for result in results if result.entry)
    skipped = merge(itertools.chain.from_iterable(result.skipped for result in results))
    noted = merge(itertools.chain.from_iterable(result.noted for result in results))
    try:
        save_catalog(ShardCatalog(fingerprint, entries, skipped, failed, options, noted), directory)
    except OSError as error:
        raise DataError(f"{directory}: cannot write the manifest: {error.strerror}") from error
    return results


def index_shard(path: Path, job: IndexJob, options: RenderOptions = DEFAULT_OPTIONS) -> ShardResult:
    """Index one shard unless its index is current."""
    try:
        tokenizer = _tokenizer(job.tokenizer)
        index = None if job.force else _current(path, tokenizer, job.verify_images, options)
        if index:
            return ShardResult.of(index, fresh=False)
        index = build_index(path, tokenizer, job.verify_images, options)
        save_index(index, path.parent)
        return ShardResult.of(index, fresh=True)
    except DataError as error:
        return ShardResult(error=str(error))
    except OSError as error:
        return ShardResult(error=f"{path}: cannot write the index: {error.strerror}")


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str | None) -> Tokenizer:
    """Load the tokenizer once in each worker process."""
    return load_tokenizer(path)


def _current(
    path: Path, tokenizer: Tokenizer, verify_images: bool, options: RenderOptions
) -> ShardIndex | None:
    """Load the stored index; None unless it was made from this file with this tokenizer, these options and checks."""
    try:
        index = load_index(path)
        stat = path.stat()
    except (DataError, OSError):
        return None
    same_file = (index.size, index.modified) == (stat.st_size, stat.st_mtime_ns)
    same_text = (index.tokenizer, index.options) == (tokenizer.fingerprint, options)
    return index if same_file and same_text and (index.images_verified or not verify_images) else None
