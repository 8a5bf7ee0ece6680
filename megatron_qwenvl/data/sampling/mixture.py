"""The mixture: which source each position of the endless stream of samples comes from.

A cyclic table of quotas, so the source of a position is computed by formula.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        """Split positions `first..first+count` of the stream among the sources.

        Returns:
            The source of each position, int32 `[count]`, and for each source how many of its samples come before
            `first`.
        """
        cycles, start = divmod(first, CYCLE)
        sources = self._source[(start + np.arange(count)) % CYCLE]
        drawn = np.bincount(self._source[:start], minlength=len(self._quota))
        return sources, [cycles * quota + int(n) for quota, n in zip(self._quota, drawn, strict=True)]


def quotas_of(weights: Sequence[float]) -> list[int]:
    """Divide `CYCLE` into positive integers in proportion to the weights."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * CYCLE
    quotas = np.maximum(np.floor(exact), 1).astype(np.int64)
    missing = CYCLE - int(quotas.sum())
    if missing > 0:
        quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    else:  # weights below a millionth were rounded up
        quotas[np.argmax(quotas)] += missing
    return [int(quota) for quota in quotas]
