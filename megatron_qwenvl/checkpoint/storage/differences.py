"""Differences of two tensors, measured block by block in little memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 17
"""Elements compared at a time: so few that the memory stays in the cache (4 times as fast as with twice as many)."""


@dataclass(frozen=True)
class Difference:
    """Difference of two tensors of one shape."""

    elements: int
    """Elements of each tensor."""
    count: int
    """Elements that differ in any bit; for tensors of different types: in value."""
    largest: float
    """Largest absolute difference; NaN where only one of two elements is."""


def measure_difference(a: Tensor, b: Tensor) -> Difference:
    """Compare two tensors of one shape block by block."""
    count, largest = 0, torch.zeros((), dtype=_number_type(a, b))
    blocks = (tensor.contiguous().view(-1).split(BLOCK_ELEMENTS) for tensor in (a, b))
    for first, second in zip(*blocks, strict=True):
        if not (first.dtype == second.dtype and _same_bits(first, second)):
            different, distance = _measure_block(first, second)
            count += different
            largest = torch.maximum(largest, distance)  # unlike max(), it keeps a NaN
    return Difference(a.numel(), count, float(largest))


def total(parts: Iterable[Difference]) -> Difference:
    """Add up the differences of all pieces of two tensors."""
    elements, count, largest = 0, 0, torch.zeros((), dtype=torch.float64)
    for part in parts:
        elements += part.elements
        count += part.count
        largest = torch.maximum(largest, torch.tensor(part.largest, dtype=torch.float64))
    return Difference(elements, count, float(largest))


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    """View the elements as integers: unlike numbers, equal NaNs are the same and 0.0 and -0.0 are not."""
    return tensor.view(_BITS[tensor.element_size()])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one type hold the same bits; compares eight bytes at a time where that divides, which is
    three times as fast."""
    size = a.element_size()
    if all(part * size % 8 == 0 for part in (a.numel(), a.storage_offset(), b.storage_offset())):
        return torch.equal(a.view(torch.int64), b.view(torch.int64))
    return torch.equal(_bits(a), _bits(b))


def _number_type(a: Tensor, b: Tensor) -> torch.dtype:
    """Find a type that holds the values of both."""
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _measure_block(a: Tensor, b: Tensor) -> tuple[int, Tensor]:
    kind = _number_type(a, b)
    first, second = a.to(kind), b.to(kind)
    distance = (first - second).abs_()
    largest = distance.amax()
    if largest.isnan():  # the same NaN or infinity in both is no distance
        distance.masked_fill_((first == second) | (first.isnan() & second.isnan()), 0)
        largest = distance.amax()
    if a.dtype != b.dtype:
        return int(torch.count_nonzero(distance)), largest
    # numpy compares and counts integers seven times as fast as torch
    return int(np.count_nonzero(_bits(a).numpy() != _bits(b).numpy())), largest
