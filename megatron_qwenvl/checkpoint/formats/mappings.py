"""How tensors of two layouts turn into each other; every mapping works in both directions.

A mapping takes the list of tensors that one side stores for a thing and gives the list that the other side
stores. All are shape algebra, so they also work on meta tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Mapping(Protocol):
    """Turns the published tensors of one thing into ours and back."""

    def to_ours(self, theirs: list[Tensor]) -> list[Tensor]:
        """Published tensors to ours."""

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        """Our tensors to the published ones."""


@dataclass(frozen=True)
class Same:
    """Stored alike."""

    def to_ours(self, theirs: list[Tensor]) -> list[Tensor]:
        """`[tensor]`."""
        return theirs

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        """`[tensor]`."""
        return ours


@dataclass(frozen=True)
class Transposed:
    """A matrix that one side multiplies from the right: ours is `[out, in]`, theirs `[in, out]`."""

    def to_ours(self, theirs: list[Tensor]) -> list[Tensor]:
        """`[in, out]` to `[out, in]`."""
        return [theirs[0].t().contiguous()]

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        """`[out, in]` to `[in, out]`."""
        return [ours[0].t().contiguous()]


@dataclass(frozen=True)
class InterleavedHeads:
    """Rows of query, key and value: ours per head `[heads, 3, head_dim]`, theirs `[3, heads, head_dim]`, in
    one tensor or in one for each of the three."""

    heads: int
    """Attention heads."""
    parts: int = 1
    """Published tensors: 1, or 3 for separate query, key and value."""

    def to_ours(self, theirs: list[Tensor]) -> list[Tensor]:
        """`[q; k; v]` rows to rows interleaved per head."""
        whole = torch.cat(theirs) if self.parts > 1 else theirs[0]
        rows = whole.unflatten(0, (3, self.heads, -1))
        return [rows.transpose(0, 1).flatten(0, 2).contiguous()]

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        """Rows interleaved per head to `[q; k; v]`."""
        rows = ours[0].unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()
        return list(rows.chunk(3)) if self.parts > 1 else [rows]


@dataclass(frozen=True)
class Stacked:
    """Ours is the published tensors one above the other, in the order given."""

    def to_ours(self, theirs: list[Tensor]) -> list[Tensor]:
        """Stack along the rows."""
        return [torch.cat(theirs)]

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        """Cut into two equal halves."""
        return list(ours[0].chunk(2))


@dataclass(frozen=True)
class Split:
    """Theirs is our three tensors one above the other."""

    def to_ours(self, theirs: list[Tensor]) -> list[Tensor]:
        """Cut into three equal parts."""
        return list(theirs[0].chunk(3))

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        """Stack along the rows."""
        return [torch.cat(ours)]


@dataclass(frozen=True)
class WithoutClassRow:
    """A position table whose first row belongs to a class token that this model does not have (import
    only)."""

    def to_ours(self, theirs: list[Tensor]) -> list[Tensor]:
        """Drop the first row."""
        return [theirs[0][1:]]

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        """The dropped row cannot be restored."""
        raise NotImplementedError("a class token's position cannot be exported")


@dataclass(frozen=True)
class PaddedRows:
    """A table that ours pads with zero rows (import only)."""

    rows: int
    """Rows of ours."""

    def to_ours(self, theirs: list[Tensor]) -> list[Tensor]:
        """Append zero rows up to `rows`."""
        table = theirs[0]
        missing = self.rows - table.shape[0]
        if missing < 0:
            raise ValueError(f"expected at most {self.rows} rows, found {table.shape[0]}")
        return [torch.cat([table, table.new_zeros(missing, *table.shape[1:])])] if missing else theirs

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        """How many rows were padding is not known."""
        raise NotImplementedError("a padded table cannot be cut back")
