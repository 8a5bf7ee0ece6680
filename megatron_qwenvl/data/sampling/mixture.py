"""What the endless order of samples is made of: the mixture of the sources, permutations, and tables of samples.

The order is a pure function of a position, computed by formula: a cyclic quota table for the mixture (here), and for
every epoch a permutation of the shards, then a permutation of the samples within each window of shards (`epochs.py`,
`source_sampler.py`). Randomness is a hash of (seed, source, epoch, window, index), so it does not depend on the version
of a random number library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CYCLE = 1 << 20


class Mixture:
    """Divides the sample stream among sources by weight.

    Within every `CYCLE` samples each source has a fixed quota (its share by largest remainder, at least one),
    spread evenly; so the proportions hold in every step to within one sample or two and exactly over a cycle.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._quota = quotas_of(weights)
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


def quotas_of(weights: Sequence[float]) -> list[int]:
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
        image_tokens: slots of one image.
        max_image_pixels: largest image.
    """

    max_length: int
    image_tokens: int
    max_image_pixels: int


@dataclass(frozen=True)
class Skipped:
    """A sample that the sampler left out, and why."""

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
        images: int32, number of images.
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
