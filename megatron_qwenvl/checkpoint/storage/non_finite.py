"""Search for NaN and infinity in tensors, by comparing integers, which costs little more than reading the bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .differences import BLOCK_ELEMENTS

_KINDS: dict[torch.dtype, tuple[torch.dtype, Any, int]] = {
    torch.float16: (torch.int16, np.uint16, 0x7C00),
    torch.bfloat16: (torch.int16, np.uint16, 0x7F80),
    torch.float32: (torch.int32, np.uint32, 0x7F80_0000),
    torch.float64: (torch.int64, np.uint64, 0x7FF0_0000_0000_0000),
}
"""Integers of each type's size, and the bits of infinity; larger ones are NaN, negative ones have the sign bit, too."""

_NAMED = 8
"""Tensors that an error names; `verify` names all."""


@dataclass(frozen=True)
class NonFinite:
    """A tensor, or a chunk of one, that holds NaN or infinity."""

    name: str
    """Name of the tensor."""
    count: int
    """Elements that are not finite."""
    first: tuple[int, ...]
    """Index of the first one in the whole tensor."""

    def __str__(self) -> str:
        return f"{self.name}: {self.count:,} not finite (NaN or infinity), the first at {list(self.first)}"


def find_non_finite(name: str, tensor: Tensor, offsets: tuple[int, ...] | None = None) -> NonFinite | None:
    """Look for NaN and infinity.

    Args:
        name: name of the tensor.
        tensor: its values, or a chunk of them; types other than floating point are always finite.
        offsets: where the chunk begins in the whole tensor, by axis; missing axes begin at 0.
    """
    if tensor.dtype not in _KINDS or _all_finite(tensor):
        return None
    places = (~tensor.isfinite()).nonzero()
    begin = [*(offsets or ())] + [0] * (tensor.dim() - len(offsets or ()))
    first = tuple(a + b for a, b in zip(places[0].tolist(), begin, strict=True))
    return NonFinite(name, len(places), first)


def _all_finite(tensor: Tensor) -> bool:
    signed, unsigned, infinity = _KINDS[tensor.dtype]
    sign = 1 << (8 * tensor.element_size() - 1)
    for block in tensor.contiguous().view(-1).split(BLOCK_ELEMENTS):
        bits = block.view(signed).numpy()
        # As signed integers, the positive ones are the largest; as unsigned ones, the negative.
        if bits.size and (bits.max() >= infinity or bits.view(unsigned).max() >= infinity | sign):
            return False
    return True


def merged(found: Iterable[NonFinite]) -> list[NonFinite]:
    """Merge the entries of each tensor's chunks."""
    tensors: dict[str, NonFinite] = {}
    for chunk in found:
        known = tensors.get(chunk.name)
        tensors[chunk.name] = (
            chunk
            if known is None
            else NonFinite(chunk.name, known.count + chunk.count, min(known.first, chunk.first))
        )
    return list(tensors.values())


def describe_non_finite(found: Iterable[NonFinite]) -> str:
    """Describe the tensors in one line; empty if there are none."""
    tensors = merged(found)
    more = f"; and {len(tensors) - _NAMED} more tensors" if len(tensors) > _NAMED else ""
    return "; ".join(map(str, tensors[:_NAMED])) + more
