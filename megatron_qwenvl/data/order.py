"""The endless order of samples: which source is next, and which sample of it.

Both are pure functions of a position, computed by formula: a cyclic quota table for the mixture, and for every
epoch a permutation of the shards, then a permutation of the samples within each window of shards. Nothing is
remembered between calls except caches. Randomness is a hash of (seed, source, epoch, window, index), so it does
not depend on the version of a random number library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import LruCache
from .errors import DataError
from .index import ShardIndex
from .manifest import ShardDirectory

CYCLE = 1 << 20


class Mixture:
    """Divides the sample stream among sources by weight.

    Within every `CYCLE` samples each source has a fixed quota (its share by largest remainder, at least one),
    spread evenly; so the proportions hold in every step to within one sample or two and exactly over a cycle.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._quota = _quotas(weights)
        # The i-th sample of a source with quota q stands at (i + 0.5) / q of the cycle.
        place = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in self._quota])
        source = np.repeat(np.arange(len(weights), dtype=np.int32), self._quota)
        self._source = source[np.argsort(place, kind="stable")]

    def split(self, first: int, count: int) -> tuple[NDArray[np.int32], list[int]]:
        """Positions `first..first+count` of the stream.

        Returns:
            The source of each position, and for each source how many of its samples come before `first`.
        """
        cycles, start = divmod(first, CYCLE)
        sources = self._source[(start + np.arange(count)) % CYCLE]
        drawn = np.bincount(self._source[:start], minlength=len(self._quota))
        return sources, [cycles * quota + int(n) for quota, n in zip(self._quota, drawn, strict=True)]


def _quotas(weights: Sequence[float]) -> list[int]:
    """Positive integers that add up to `CYCLE`, in proportion to the weights."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * CYCLE
    quotas = np.maximum(np.floor(exact), 1).astype(np.int64)
    missing = CYCLE - int(quotas.sum())
    if missing > 0:
        quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    else:  # weights below a millionth were rounded up
        quotas[np.argmax(quotas)] += missing
    return [int(quota) for quota in quotas]


def hash64(*key: object) -> int:
    """64 bits that depend on every part of `key` and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def permutation(length: int, *key: object) -> NDArray[np.int64]:
    """A permutation of `0..length-1` that depends on `key` alone: the order of SplitMix64 hashes."""
    x = np.uint64(hash64(*key)) + np.arange(length, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


@dataclass(frozen=True)
class Limits:
    """Which samples can be used.

    Attributes:
        max_length: longest sample in tokens, image slots included.
        image_tokens: slots of one picture.
        max_image_pixels: largest picture.
    """

    max_length: int
    image_tokens: int
    max_image_pixels: int


@dataclass(frozen=True)
class Skipped:
    """A sample that the plan left out, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class SampleTable:
    """Columns of planned samples, all `[N]`.

    Attributes:
        source: int32, index of the source.
        shard: int32, index of the shard in its directory.
        row: int32, row in the shard's index.
        length: int32, tokens with image slots.
        images: int32, number of pictures.
        task: uint8, index into `TASKS`.
    """

    source: NDArray[np.int32]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]
    length: NDArray[np.int32]
    images: NDArray[np.int32]
    task: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.source)

    def take(self, rows: Any) -> SampleTable:
        """The given rows (an index array or a slice)."""
        return SampleTable(**{name: column[rows] for name, column in vars(self).items()})

    @staticmethod
    def concatenate(tables: Sequence[SampleTable]) -> SampleTable:
        """One table after the other."""
        names = vars(tables[0])
        return SampleTable(
            **{name: np.concatenate([getattr(table, name) for table in tables]) for name in names}
        )


@dataclass(frozen=True)
class _Window:
    """The samples of a few shards, shuffled; `skipped` by their place in it."""

    samples: SampleTable
    skipped: dict[int, Skipped]


class SourceOrder:
    """The endless order of one source's samples.

    A sample that cannot be used gives its place to another one of its window, and is reported whenever the order
    comes to it, so once an epoch.
    """

    def __init__(
        self,
        number: int,
        directory: ShardDirectory,
        window_shards: int,
        limits: Limits,
        seed: int,
        load_index: Callable[[int], ShardIndex],
    ) -> None:
        """
        Args:
            number: index of the source.
            directory: its shards.
            window_shards: shards that are shuffled together.
            limits: which samples can be used.
            seed: of this source's permutations.
            load_index: index of a shard by its number; expected to cache.
        """
        self.total = int(directory.counts.sum())
        self._number = number
        self._directory = directory
        self._window_shards = window_shards
        self._limits = limits
        self._seed = seed
        self._load_index = load_index
        self._epochs: LruCache[tuple[NDArray[np.int64], NDArray[np.int64]]] = LruCache(2)
        self._windows: LruCache[_Window] = LruCache(3)

    def take(self, first: int, count: int) -> tuple[list[SampleTable], list[Skipped]]:
        """Samples `first..first+count` of the endless order, in pieces, and what was left out on the way.

        Raises:
            DataError: an index cannot be read, or no sample of the source can be used.
        """
        pieces: list[SampleTable] = []
        skipped: list[Skipped] = []
        while count > 0:
            epoch, position = divmod(first, self.total)
            starts = self._epoch(epoch)[1]
            number = int(np.searchsorted(starts, position, side="right")) - 1
            window = self._window(epoch, number)
            begin = position - int(starts[number])
            end = min(begin + count, int(starts[number + 1] - starts[number]))
            samples = window.samples if len(window.samples) else self._next_usable(epoch, number)
            pieces.append(samples.take(np.arange(begin, end) % len(samples)))
            skipped += [what for place, what in window.skipped.items() if begin <= place < end]
            first, count = first + end - begin, count - (end - begin)
        return pieces, skipped

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Order of the shards, and the position at which each window of them starts (with the total at the end)."""

        def make() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            order = permutation(len(self._directory.counts), self._seed, epoch)
            ends = np.cumsum(self._directory.counts[order])
            starts = np.concatenate(
                [[0], ends[self._window_shards - 1 : -1 : self._window_shards], ends[-1:]]
            )
            return order, starts

        return self._epochs.get(epoch, make)

    def _window(self, epoch: int, number: int) -> _Window:
        """A window's samples; none if not a single one can be used."""

        def make() -> _Window:
            begin = number * self._window_shards
            shards = self._epoch(epoch)[0][begin : begin + self._window_shards]
            table = SampleTable.concatenate([self._shard(int(shard)) for shard in shards])
            order = permutation(len(table), self._seed, epoch, number)
            usable = np.concatenate([self._usable(int(shard)) for shard in shards])[order]
            good, bad = order[usable], np.flatnonzero(~usable)
            skipped = {int(place): self._reason(table, int(order[place])) for place in bad}
            if len(good):
                order[bad] = good[np.arange(len(bad)) % len(good)]
            return _Window(table.take(order if len(good) else good), skipped)

        return self._windows.get((epoch, number), make)

    def _next_usable(self, epoch: int, number: int) -> SampleTable:
        """What stands in for a window without a usable sample: the nearest following window that has one."""
        windows = len(self._epoch(epoch)[1]) - 1
        for step in range(1, windows):
            samples = self._window(epoch, (number + step) % windows).samples
            if len(samples):
                return samples
        raise DataError(f"{self._directory.path}: no sample fits {self._limits}")

    def _shard(self, shard: int) -> SampleTable:
        index = self._load_index(shard)
        rows = np.arange(len(index), dtype=np.int32)
        return SampleTable(
            source=np.full(len(index), self._number, dtype=np.int32),
            shard=np.full(len(index), shard, dtype=np.int32),
            row=rows,
            length=self._lengths(index),
            images=index.image_counts.astype(np.int32),
            task=index.arrays["tasks"],
        )

    def _lengths(self, index: ShardIndex) -> NDArray[np.int32]:
        slots = index.image_counts * self._limits.image_tokens
        return (index.arrays["text_tokens"] + slots).astype(np.int32)

    def _usable(self, shard: int) -> NDArray[np.bool_]:
        index = self._load_index(shard)
        limits = self._limits
        return (self._lengths(index) <= limits.max_length) & (index.largest_images <= limits.max_image_pixels)

    def _reason(self, table: SampleTable, row: int) -> Skipped:
        index = self._load_index(int(table.shard[row]))
        key = f"{self._directory.shard_path(int(table.shard[row]))}:{index.key(int(table.row[row]))}"
        if (length := int(table.length[row])) > self._limits.max_length:
            return Skipped(key, f"{length} tokens, at most {self._limits.max_length} are allowed")
        pixels = int(index.largest_images[int(table.row[row])])
        return Skipped(
            key, f"picture of {pixels} pixels, at most {self._limits.max_image_pixels} are allowed"
        )
