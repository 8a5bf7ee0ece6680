"""Samples to packs, and packs to ranks.

Packs are made from the whole global batch, without regard to the number of ranks; dividing them among ranks is a
second step. So the packs of a step are the same in every parallel layout.

`isolated` packs have a block-diagonal attention mask: every sample is a segment of its own and sees itself alone.
`interleaved` packs (the paper's stage 2) are one segment under plain causal attention: a sample sees those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_qwenvl.config.schema import Packing

from .sample_table import SampleTable

Pack = tuple[int, ...]  # rows of the global batch's table, ascending; () is an empty pack


def make_packs(samples: SampleTable, packing: Packing, capacity: int) -> list[Pack]:
    """Pack samples by best-fit decreasing; with `interleaved`, the samples of each task on their own.

    Args:
        samples: the global batch; no sample is longer than `capacity`.
        packing: `none` puts every sample into a pack of its own.
        capacity: tokens of a pack.

    Returns:
        The packs. Within a pack samples keep the order of the batch.
    """
    if packing == "none":
        return [(row,) for row in range(len(samples))]
    if packing == "isolated":
        return _best_fit_decreasing(samples.length, np.arange(len(samples)), capacity)
    packs: list[Pack] = []
    for task in np.unique(samples.task):
        packs += _best_fit_decreasing(samples.length, np.flatnonzero(samples.task == task), capacity)
    return packs


def _best_fit_decreasing(lengths: NDArray[np.int32], rows: NDArray[np.int64], capacity: int) -> list[Pack]:
    """Put each sample, longest first, into the fullest pack that still holds it.

    The free capacities that occur are the set bits of one integer, so the best fit is the lowest bit at or above
    the length: a few machine operations per sample.
    """
    packs: list[list[int]] = []
    open_packs: list[list[list[int]]] = [[] for _ in range(capacity + 1)]  # by free capacity
    free = 0
    for row in rows[np.argsort(-lengths[rows], kind="stable")].tolist():
        length = int(lengths[row])
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = open_packs[room].pop()
            if not open_packs[room]:
                free ^= 1 << room
        else:
            room, pack = capacity, []
            packs.append(pack)
        pack.append(row)
        open_packs[room - length].append(pack)
        free |= 1 << (room - length)
    return [tuple(sorted(pack)) for pack in packs]


@dataclass(frozen=True)
class CostWeights:
    """Cost of a pack in units of one decoder token.

    Attributes:
        attention: of one unit of squared segment length: attention scores against the dense layers, about
            1 / (12 hidden) at hidden 4096 under a causal mask.
        image: of one image: the ViT's share of the parameters (1.84B against 7.72B) times its patches.
    """

    attention: float
    image: float

    @classmethod
    def at(cls, image_size: int) -> CostWeights:
        """Return the weights of the full-size model for images of `image_size` pixels a side."""
        return cls(attention=2e-5, image=0.24 * (image_size / 14) ** 2)


def pack_costs(packs: Sequence[Pack], samples: SampleTable, weights: CostWeights) -> list[float]:
    """Compute the cost of each pack in decoder tokens."""
    length = samples.length.astype(np.float64)
    cost = length + weights.attention * length**2 + weights.image * samples.images
    return [float(cost[list(pack)].sum()) for pack in packs]


def balance_across_ranks(
    packs: Sequence[Pack], costs: Sequence[float], ranks: int, slots: int
) -> list[list[Pack]]:
    """Give every rank the same number of packs, of nearly the same cost in every slot and in all.

    Packs are laid out by falling cost, one for each rank a slot; within a slot the rank with the least so far
    gets the most expensive one. Empty packs fill up the last slots.

    Returns:
        `[ranks][slots]`.
    """
    by_cost = sorted(range(len(packs)), key=lambda i: (-costs[i], i))
    packs_of: list[list[Pack]] = [[] for _ in range(ranks)]
    total = [0.0] * ranks
    for begin in range(0, ranks * slots, ranks):
        lightest_first = sorted(range(ranks), key=lambda rank: (total[rank], rank))
        for place, rank in enumerate(lightest_first, begin):
            if place < len(by_cost):
                total[rank] += costs[by_cost[place]]
                packs_of[rank].append(packs[by_cost[place]])
            else:
                packs_of[rank].append(())
    return packs_of
