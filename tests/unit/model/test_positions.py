"""The adapter's constant position table against the formula of the published code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_qwenvl.model.positions import sincos_table


def published_table(width: int, grid: int) -> torch.Tensor:
    """`get_2d_sincos_pos_embed` by its definition (float32 numpy throughout, the column first)."""
    side = np.arange(grid, dtype=np.float32)
    columns, rows = np.meshgrid(side, side)
    omega = np.arange(width // 4, dtype=np.float32)
    omega /= width / 4.0
    omega = 1.0 / 10000**omega
    halves = []
    for axis in (columns, rows):
        angles = np.einsum("m,d->md", axis.reshape(-1), omega)
        halves += [np.sin(angles), np.cos(angles)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()


@pytest.mark.parametrize(("grid", "width"), [(16, 4096), (16, 3584), (3, 8)])
def test_the_table_is_the_published_one_to_the_bit(grid: int, width: int) -> None:
    table = sincos_table(grid, width)
    assert table.dtype == torch.float32 and table.is_contiguous()
    assert torch.equal(table, published_table(width, grid))
