"""Tensors of a checkpoint: their full shapes and types, and sources that read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """Full shape and type of a stored tensor."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


Region = tuple[slice, ...]
"""Place of a chunk in its full tensor."""


class TensorSource(Protocol):
    """Named tensors that can be read one at a time, in any process (a source can be pickled)."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Specs of all tensors by name."""

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory."""
