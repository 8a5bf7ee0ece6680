"""Position tables of ViT and adapter, and rotary frequencies of the decoder."""

from __future__ import annotations

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
    """The adapter's constant 2-D sin-cos table (Qwen-VL section 2.1; MAE, arXiv 2111.06377).

    The first half of the channels encodes the column, the second half the row; each half is [sin | cos] of the
    position times 10000^(-k / (width / 4)).

    Returns:
        float32 `[grid^2, width]`, rows in raster order.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # [grid, width / 4]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    columns = line[None, :, :].expand(grid, grid, -1)
    rows = line[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(grid * grid, width).float()


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
