"""NaN and infinity in tensors: looked for in integers, which costs little more than having the bytes in hand."""

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
"""By type: integers of its size, and the bits of infinity. Larger ones are NaN; negative ones have the sign bit too."""

_NAMED = 8
"""Tensors that an error names; `verify` names all."""


@dataclass(frozen=True)
class NonFinite:
    """A tensor, or a part of one, that holds NaN or infinity."""

    name: str
    """The tensor."""
    count: int
    """Elements that are not finite."""
    first: tuple[int, ...]
    """Index of the first one in the whole tensor."""

    def __str__(self) -> str:
        return f"{self.name}: {self.count:,} not finite (NaN or infinity), the first at {list(self.first)}"


def find_non_finite(name: str, tensor: Tensor, offsets: tuple[int, ...] | None = None) -> NonFinite | None:
    """Look for NaN and infinity.

    Args:
        name: of the tensor.
        tensor: it, or a part of it; other than floating-point numbers are always finite.
        offsets: where the part begins in the whole tensor, by axis, or on the first axes alone.
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
    """One entry for each tensor, from those of its parts."""
    tensors: dict[str, NonFinite] = {}
    for part in found:
        known = tensors.get(part.name)
        tensors[part.name] = (
            part
            if known is None
            else NonFinite(part.name, known.count + part.count, min(known.first, part.first))
        )
    return list(tensors.values())


def describe_non_finite(found: Iterable[NonFinite]) -> str:
    """The tensors in one line; empty: there are none."""
    tensors = merged(found)
    more = f"; and {len(tensors) - _NAMED} more tensors" if len(tensors) > _NAMED else ""
    return "; ".join(map(str, tensors[:_NAMED])) + more
