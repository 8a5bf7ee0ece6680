"""Mappings between the tensors of the Hugging Face format (`hf`) and of this project's checkpoints (`megatron`).

A mapping takes the tensors that one format stores for some weights and returns those that the other one stores, in both
directions. All are shape algebra, so they also work on meta tensors. `hf` stands for OpenCLIP's own format, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Mapping(Protocol):
    """Converts the tensors of some weights between both formats."""

    def to_megatron(self, hf: list[Tensor]) -> list[Tensor]:
        """Convert from the Hugging Face format."""

    def to_hf(self, megatron: list[Tensor]) -> list[Tensor]:
        """Convert to the Hugging Face format."""


@dataclass(frozen=True)
class Identity:
    """Stored in the same way by both."""

    def to_megatron(self, hf: list[Tensor]) -> list[Tensor]:
        """`[tensor]`."""
        return hf

    def to_hf(self, megatron: list[Tensor]) -> list[Tensor]:
        """`[tensor]`."""
        return megatron


@dataclass(frozen=True)
class Transposed:
    """A matrix stored transposed: megatron `[out, in]`, hf `[in, out]`."""

    def to_megatron(self, hf: list[Tensor]) -> list[Tensor]:
        """`[in, out]` to `[out, in]`."""
        return [hf[0].t().contiguous()]

    def to_hf(self, megatron: list[Tensor]) -> list[Tensor]:
        """`[out, in]` to `[in, out]`."""
        return [megatron[0].t().contiguous()]


@dataclass(frozen=True)
class InterleavedHeads:
    """Rows of query, key and value: megatron `[groups, heads / groups + 2, head_dim]`, a group's queries before its key
    and its value; hf all queries, all keys, all values, in one tensor or in one for each of the three."""

    heads: int
    """Attention heads."""
    hf_tensors: int = 1
    """Tensors in the Hugging Face format: 1, or 3 for separate query, key and value."""
    query_groups: int | None = None
    """Key and value heads; None: as many as attention heads."""

    def to_megatron(self, hf: list[Tensor]) -> list[Tensor]:
        """Interleave `[q; k; v]` rows per group."""
        whole = torch.cat(hf) if self.hf_tensors > 1 else hf[0]
        groups, heads = self._groups, self.heads
        parts = whole.unflatten(0, (heads + 2 * groups, -1)).split((heads, groups, groups))
        parts = [part.unflatten(0, (groups, -1)) for part in parts]
        return [torch.cat(parts, dim=1).flatten(0, 2)]

    def to_hf(self, megatron: list[Tensor]) -> list[Tensor]:
        """Order rows as `[q; k; v]`."""
        shared = self.heads // self._groups
        rows = megatron[0].unflatten(0, (self._groups, shared + 2, -1))
        parts = [part.flatten(0, 2) for part in rows.split((shared, 1, 1), dim=1)]
        return parts if self.hf_tensors > 1 else [torch.cat(parts)]

    @property
    def _groups(self) -> int:
        return self.query_groups or self.heads


@dataclass(frozen=True)
class Stacked:
    """One megatron tensor holds the rows of several hf tensors, in the order given."""

    def to_megatron(self, hf: list[Tensor]) -> list[Tensor]:
        """Concatenate along the rows."""
        return [torch.cat(hf)]

    def to_hf(self, megatron: list[Tensor]) -> list[Tensor]:
        """Cut into two equal halves."""
        return list(megatron[0].chunk(2))


@dataclass(frozen=True)
class Split:
    """One hf tensor holds the rows of three megatron tensors."""

    def to_megatron(self, hf: list[Tensor]) -> list[Tensor]:
        """Cut into three equal parts."""
        return list(hf[0].chunk(3))

    def to_hf(self, megatron: list[Tensor]) -> list[Tensor]:
        """Concatenate along the rows."""
        return [torch.cat(megatron)]


@dataclass(frozen=True)
class WithoutClassRow:
    """A position table whose first row belongs to a class token, which this model does not have (import only)."""

    def to_megatron(self, hf: list[Tensor]) -> list[Tensor]:
        """Drop the first row."""
        return [hf[0][1:]]

    def to_hf(self, megatron: list[Tensor]) -> list[Tensor]:
        """Fail: the dropped row cannot be restored."""
        raise NotImplementedError("a class token's position cannot be exported")


@dataclass(frozen=True)
class PaddedRows:
    """A table that is padded with zero rows for megatron (import only)."""

    rows: int
    """Rows after padding."""

    def to_megatron(self, hf: list[Tensor]) -> list[Tensor]:
        """Append zero rows up to `rows`."""
        table = hf[0]
        missing = self.rows - table.shape[0]
        if missing < 0:
            raise ValueError(f"expected at most {self.rows} rows, found {table.shape[0]}")
        return [torch.cat([table, table.new_zeros(missing, *table.shape[1:])])] if missing else hf

    def to_hf(self, megatron: list[Tensor]) -> list[Tensor]:
        """Fail: the number of padding rows is not known."""
        raise NotImplementedError("a padded table cannot be cut back")
