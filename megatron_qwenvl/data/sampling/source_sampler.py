"""The samples of one source at the places of its endless order (`epochs.py`), with stand-ins for unusable ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.lru_cache import LruCache
from megatron_qwenvl.data.shards.directory import ShardDirectory
from megatron_qwenvl.data.shards.index import ShardIndex

from .epochs import Editions, Epoch
from .sample_table import SampleLimits, SampleTable, Skipped


@dataclass(frozen=True)
class _Window:
    """The samples of a few shards, shuffled; `skipped` by their place in it."""

    samples: SampleTable
    skipped: dict[int, Skipped]


class SourceSampler:
    """Samples one source in the endless order of one of its editions.

    A sample beyond the limits gives its place to another one of its window, and is reported whenever its turn comes,
    so once an epoch.
    """

    def __init__(
        self,
        number: int,
        directory: ShardDirectory,
        editions: Editions,
        edition: int,
        limits: SampleLimits,
        load_index: Callable[[int], ShardIndex],
    ) -> None:
        """
        Args:
            number: index of the source.
            directory: its shards as they are now.
            editions: the order of its samples.
            edition: number of the edition that counts.
            limits: which samples can be used.
            load_index: index of a shard by its number in `directory`; expected to cache.
        """
        self._number = number
        self._directory = directory
        self._editions = editions
        self._edition = edition
        self._limits = limits
        self._load_index = load_index
        self._windows: LruCache[_Window] = LruCache(3)
        today = {shard.name: place for place, shard in enumerate(directory.catalog.shards)}
        self._today = [today.get(name, -1) for name in editions[edition].shards.names]

    def take(self, first: int, count: int) -> tuple[list[SampleTable], list[Skipped]]:
        """Take samples `first..first+count` of the edition's endless order, in pieces, and those skipped on the way.

        Raises:
            DataError: an index cannot be read, or no sample of the source can be used.
        """
        pieces: list[SampleTable] = []
        skipped: list[Skipped] = []
        while count > 0:
            number, place = self._editions.place(self._edition, first)
            epoch = self._epoch(number)
            at = epoch.window_at(place)
            window = self._window(number, at)
            begin = place - int(epoch.starts[at])
            end = min(begin + count, int(epoch.starts[at + 1] - epoch.starts[at]))
            samples = window.samples if len(window.samples) else self._next_usable(number, at)
            pieces.append(samples.take(np.arange(begin, end) % len(samples)))
            skipped += [sample for place, sample in window.skipped.items() if begin <= place < end]
            first, count = first + end - begin, count - (end - begin)
        return pieces, skipped

    def _epoch(self, number: int) -> Epoch:
        return self._editions.epoch(self._edition, number)

    def _window(self, number: int, at: int) -> _Window:
        """Return the samples of window `at` of epoch `number`; an empty table if none of them can be used."""

        def make() -> _Window:
            epoch = self._epoch(number)
            shards = epoch.shards_of(at)
            rows = [self._rows(epoch, shard) for shard in shards]
            parts = list(zip(shards, rows, strict=True))
            table = SampleTable.concatenate([self._shard(shard, some) for shard, some in parts])
            order = epoch.order_of(at)
            usable = np.concatenate([self._usable(shard, some) for shard, some in parts])[order]
            good, bad = order[usable], np.flatnonzero(~usable)
            skipped = {int(place): self._reason(table, int(order[place])) for place in bad}
            if len(good):
                order[bad] = good[np.arange(len(bad)) % len(good)]
            return _Window(table.take(order if len(good) else good), skipped)

        return self._windows.get((number, at), make)

    def _next_usable(self, number: int, at: int) -> SampleTable:
        """Find the stand-in for a window without a usable sample: the nearest following window that has one.

        If there is none in the rest of this epoch, one of the next.
        """
        windows = self._epoch(number).windows
        following = [(number, (at + step) % windows) for step in range(1, windows)]
        if self._epoch(number).places < self._editions[self._edition].shards.total:
            following += [(number + 1, window) for window in range(self._epoch(number + 1).windows)]
        for place in following:
            samples = self._window(*place).samples
            if len(samples):
                return samples
        raise DataError(f"{self._directory.path}: no sample fits {self._limits}")

    def _rows(self, epoch: Epoch, shard: int) -> NDArray[np.int64]:
        count = self._editions[self._edition].shards.counts[shard]
        return epoch.rows.get(shard, np.arange(count))

    def _index(self, shard: int, rows: NDArray[np.int64]) -> ShardIndex:
        """Load the index of a shard of the edition, which must still have these rows.

        Raises:
            DataError: the shard has gone since, or lost samples.
        """
        name = self._editions[self._edition].shards.names[shard]
        if self._today[shard] < 0:
            raise DataError(
                f"{self._directory.path / name}: this step was made with a shard that is gone since"
            )
        index = self._load_index(self._today[shard])
        if len(rows) and rows[-1] >= len(index):
            raise DataError(
                f"{self._directory.path / name}: this step was made when the shard had more than its "
                f"{len(index)} samples"
            )
        return index

    def _shard(self, shard: int, rows: NDArray[np.int64]) -> SampleTable:
        index = self._index(shard, rows)
        return SampleTable(
            source=np.full(len(rows), self._number, dtype=np.int32),
            shard=np.full(len(rows), self._today[shard], dtype=np.int32),
            row=rows.astype(np.int32),
            length=self._lengths(index)[rows],
            images=index.image_counts[rows].astype(np.int32),
            task=index.arrays["tasks"][rows],
        )

    def _lengths(self, index: ShardIndex) -> NDArray[np.int32]:
        slots = index.image_counts * self._limits.image_tokens
        return (index.arrays["text_tokens"] + slots).astype(np.int32)

    def _usable(self, shard: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        index = self._index(shard, rows)
        limits = self._limits
        short = self._lengths(index) <= limits.max_length
        return (short & (index.largest_images <= limits.max_image_pixels))[rows]

    def _reason(self, table: SampleTable, row: int) -> Skipped:
        index = self._load_index(int(table.shard[row]))
        key = f"{self._directory.shard_path(int(table.shard[row]))}:{index.key(int(table.row[row]))}"
        if (length := int(table.length[row])) > self._limits.max_length:
            return Skipped(key, f"{length} tokens, at most {self._limits.max_length} are allowed")
        pixels = int(index.largest_images[int(table.row[row])])
        return Skipped(key, f"image of {pixels} pixels, at most {self._limits.max_image_pixels} are allowed")
