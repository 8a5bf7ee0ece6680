"""The places of a source's samples in its endless order, over all states that its shards have had.

Computed from the shards' sample counts alone: no index is read. Every epoch is a permutation of the shards, then of
the samples within each window of shards. When the shards (or the window, or the seed) change within an epoch, a new
`Edition` of the source begins: the rest of that epoch are the samples whose own place was not reached yet, in an order
of their own, and every later epoch is the plain order over the new shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_qwenvl.data.lru_cache import LruCache
from megatron_qwenvl.data.shards.directory import ShardDirectory

from .permutation import hash64, permutation

DIGEST_LETTERS = 16
"""Number of letters kept of a shard's digest."""


@dataclass(frozen=True)
class ShardList:
    """The shards of a source at some time. A sample is known by the name of its shard and its row in there.

    Attributes:
        names: file names, sorted.
        counts: usable samples of each shard.
        digests: beginning of each shard's digest.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    digests: tuple[str, ...]

    @classmethod
    def of(cls, directory: ShardDirectory) -> ShardList:
        """List the shards of an opened directory."""
        shards = directory.catalog.shards
        return cls(
            tuple(shard.name for shard in shards),
            tuple(shard.samples for shard in shards),
            tuple(shard.digest[:DIGEST_LETTERS] for shard in shards),
        )

    @cached_property
    def total(self) -> int:
        """Samples of all shards."""
        return sum(self.counts)


@dataclass(frozen=True)
class Edition:
    """A source between two changes of its shards, window or seed.

    Attributes:
        shards: its shards.
        seed: of the run.
        window: shards that are shuffled together.
        epoch: the epoch in which the edition begins.
        taken: places of that epoch, in the order of the edition before, that were taken before it.
    """

    shards: ShardList
    seed: int
    window: int
    epoch: int = 0
    taken: int = 0


Rows = int | NDArray[np.int64]
"""Rows of a shard: the first n of them, or those listed."""


@dataclass(frozen=True)
class Epoch:
    """The order of one epoch, or of the rest of one.

    Attributes:
        shard_order: int64 `[S]`, indices into the edition's shard list, in their order.
        starts: int64 `[W + 1]`, place at which each window starts, and the number of places.
        rows: for shards of which only some rows belong to the epoch: those rows.
        window: shards of a window.
        key: of the permutations within windows.
    """

    shard_order: NDArray[np.int64]
    starts: NDArray[np.int64]
    rows: dict[int, NDArray[np.int64]]
    window: int
    key: tuple[object, ...]

    @classmethod
    def make(
        cls,
        shards: NDArray[np.int64],
        counts: NDArray[np.int64],
        rows: dict[int, NDArray[np.int64]],
        window: int,
        key: tuple[object, ...],
    ) -> Epoch:
        """Shuffle `shards` (`[S]`) of `counts` (`[S]`) rows each into windows."""
        order = permutation(len(shards), *key)
        ends = np.cumsum(counts[order])
        starts = np.concatenate([[0], ends[window - 1 : -1 : window], ends[-1:]])
        return cls(shards[order], starts, rows, window, key)

    @property
    def places(self) -> int:
        """Number of samples."""
        return int(self.starts[-1])

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self.starts) - 1

    def window_at(self, place: int) -> int:
        """Return the window that a place lies in."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    def shards_of(self, window: int) -> list[int]:
        """Return the shards of a window, in their order."""
        return list(map(int, self.shard_order[window * self.window : (window + 1) * self.window]))

    def order_of(self, window: int) -> NDArray[np.int64]:
        """Return the row at each place of a window, counted over the rows of its shards one after the other."""
        return permutation(int(self.starts[window + 1] - self.starts[window]), *self.key, window)


class Editions:
    """The endless order of one source over all its editions.

    A position counts the samples that an edition has given; it is 0 where the edition begins.

    Args:
        name: of the source.
        editions: from old to new.
    """

    def __init__(self, name: str, editions: Sequence[Edition]) -> None:
        self._name = name
        self._editions = tuple(editions)
        self._epochs: LruCache[Epoch] = LruCache(2)
        self._rests: dict[int, Epoch | None] = {}

    def __getitem__(self, number: int) -> Edition:
        return self._editions[number]

    def place(self, number: int, position: int) -> tuple[int, int]:
        """Return epoch and place of a position in edition `number`."""
        edition, rest = self._editions[number], self._rest(number)
        begun = 0 if rest is None else rest.places
        if position < begun:
            return edition.epoch, position
        epochs, place = divmod(position - begun, edition.shards.total)
        return edition.epoch + (rest is not None) + epochs, place

    def epoch(self, number: int, epoch: int) -> Epoch:
        """Return the order of an epoch in edition `number`; of the epoch in which the edition begins, the rest."""
        edition = self._editions[number]
        rest = self._rest(number) if epoch == edition.epoch else None
        return rest or self._epochs.get((number, epoch), lambda: self._plain(edition, epoch))

    def unseen(self, number: int) -> NDArray[np.int64]:
        """Count the samples of each shard that are left of the epoch in which edition `number` begins, `[shards]`."""
        rest = self._rest(number)
        counts = np.array(self._editions[number].shards.counts, dtype=np.int64)
        if rest is None:
            return counts
        left = np.zeros_like(counts)
        left[rest.shard_order] = counts[rest.shard_order]
        for shard, rows in rest.rows.items():
            left[shard] = len(rows)
        return left

    def _plain(self, edition: Edition, epoch: int) -> Epoch:
        counts = np.array(edition.shards.counts, dtype=np.int64)
        key = (hash64(edition.seed, self._name), epoch)
        return Epoch.make(np.arange(len(counts)), counts, {}, edition.window, key)

    def _rest(self, number: int) -> Epoch | None:
        """Return the rest of the epoch in which an edition begins; None: all of it."""
        if number not in self._rests:
            seen = self._seen(number)
            self._rests[number] = self._left_by(seen, number) if seen else None
        return self._rests[number]

    def _left_by(self, seen: dict[str, Rows], number: int) -> Epoch:
        edition = self._editions[number]
        counts = np.array(edition.shards.counts, dtype=np.int64)
        rows: dict[int, NDArray[np.int64]] = {}
        for shard, name in enumerate(edition.shards.names):
            if name in seen:
                rows[shard] = _others(seen[name], int(counts[shard]))
                counts[shard] = len(rows[shard])
        shards = np.flatnonzero(counts)
        partly = {shard: some for shard, some in rows.items() if len(some)}
        key = (hash64(edition.seed, self._name), edition.epoch, "rest", number)
        return Epoch.make(shards, counts[shards], partly, edition.window, key)

    def _seen(self, number: int) -> dict[str, Rows]:
        """Collect the rows, by shard, whose place in its first epoch came before edition `number` began."""
        if number == 0:
            return {}
        edition, before = self._editions[number], self._editions[number - 1]
        seen = dict(self._seen(number - 1)) if edition.epoch == before.epoch else {}
        epoch = self.epoch(number - 1, edition.epoch)
        for shard, rows in _first_places(epoch, before.shards, edition.taken):
            name = before.shards.names[shard]
            seen[name] = _both(seen[name], rows) if name in seen else rows
        return seen


def _first_places(epoch: Epoch, listed: ShardList, taken: int) -> list[tuple[int, Rows]]:
    """List the rows, by shard, of the first `taken` places of an epoch."""
    if taken == 0:
        return []
    whole = epoch.window_at(taken) if taken < epoch.places else epoch.windows
    done = epoch.shard_order[: whole * epoch.window].tolist()
    found: list[tuple[int, Rows]] = [(shard, epoch.rows.get(shard, listed.counts[shard])) for shard in done]
    if whole < epoch.windows:
        came = np.sort(epoch.order_of(whole)[: taken - int(epoch.starts[whole])])
        first = 0
        for shard in epoch.shards_of(whole):
            rows = epoch.rows.get(shard, np.arange(listed.counts[shard]))
            begin, end = np.searchsorted(came, [first, first + len(rows)])
            if end > begin:
                found.append((shard, rows[came[begin:end] - first]))
            first += len(rows)
    return [(shard, rows) for shard, rows in found if not isinstance(rows, int) or rows]


def _others(rows: Rows, count: int) -> NDArray[np.int64]:
    """Return the rows of a shard of `count` rows that are not among `rows`."""
    if isinstance(rows, int):
        return np.arange(rows, max(rows, count))
    return np.setdiff1d(np.arange(count), rows, assume_unique=True)


def _both(rows: Rows, more: Rows) -> Rows:
    """Return the rows that are in either."""
    if isinstance(rows, int) and isinstance(more, int):
        return max(rows, more)
    either = np.union1d(*(np.arange(some) if isinstance(some, int) else some for some in (rows, more)))
    return len(either) if either[-1] == len(either) - 1 else either
