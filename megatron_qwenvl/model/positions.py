"""Position tables of ViT and adapter, and rotary frequencies of the decoder."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def resize_grid(table: Tensor, grid: int) -> Tensor:
    """Resize a square position table to `grid` x `grid`, as the published model does.

    Bicubic, in float32, `align_corners=False`; unchanged when the grid already fits.

    Args:
        table: `[side^2, width]`.

    Returns:
        `[grid^2, width]` in the table's dtype.
    """
    side = round(table.shape[0] ** 0.5)
    if side == grid:
        return table
    square = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(table.dtype)


def sincos_table(grid: int, width: int) -> Tensor:
    """The adapter's constant 2-D sin-cos table, bit for bit that of the published code.

    The first half of the channels encodes the column, the second half the row; each half is [sin | cos] of the
    position times 10000^(-k / (width / 4)). Every step is numpy's in float32, as in `get_2d_sincos_pos_embed` of the
    published Qwen-VL (`visual.py`, after MAE, arXiv 2111.06377); other libraries differ in the last bits.

    Returns:
        float32 `[grid^2, width]`, rows in raster order.
    """
    quarter = width // 4
    frequencies = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float32) / np.float32(quarter))
    angles = np.outer(np.arange(grid, dtype=np.float32), frequencies)
    line = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))  # [grid, width / 2]
    columns = line[None, :, :].expand(grid, grid, -1)
    rows = line[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(grid * grid, width)


def rotary_frequencies(positions: Tensor, head_dim: int, base: float) -> Tensor:
    """Rotary angles of every position, in the two-halves layout.

    Args:
        positions: integers `[T]`.

    Returns:
        float32 `[T, 1, 1, head_dim]`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] * (base**-exponents)
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]
