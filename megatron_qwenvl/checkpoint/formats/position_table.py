"""The adapter's constant position table: published as a tensor, computed here, moved by published fine-tuning.

The published fine-tuning script frees everything below `attn_pool` for training, and the table, meant to be constant,
lies there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_qwenvl.checkpoint.storage.differences import measure
from megatron_qwenvl.checkpoint.storage.files import CheckpointError
from megatron_qwenvl.checkpoint.storage.finite import find_non_finite
from megatron_qwenvl.config.schema import ModelConfig

from .hf_files import PublishedWeights
from .names import TABLE_NAME

_FLOAT32_TABLE = 1e-5
"""Largest difference of position tables of up to 16 rows between libraries; measured: 2e-6."""


def published_table(grid: int, width: int, dtype: torch.dtype) -> Tensor:
    """The adapter's constant 2D position table `[grid^2, width]`.

    The first half of the channels encodes the column, the second half the row; each half is [sin | cos] of
    position x 10000^(-k / (width/4)), k = 0..width/4-1, in float32.
    """
    quarter = width // 4  # numpy, as the published table was made: other libraries differ in the last bit
    frequencies = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float32) / np.float32(quarter))
    angles = np.outer(np.arange(grid, dtype=np.float32), frequencies)
    line = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))  # [grid, width/2]
    columns = line.unsqueeze(0).expand(grid, grid, -1)
    rows = line.unsqueeze(1).expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).to(dtype).contiguous()


def check_table(
    directory: Path, weights: PublishedWeights, model: ModelConfig, accept_drift: bool
) -> tuple[float | None, tuple[str, ...]]:
    """The adapter's position table is not stored, so the published one must be the constant that it is meant to be.

    Returns:
        How far it is from that, if by more than rounding, and notes where it is not the same to the bit.
    """
    if TABLE_NAME not in weights.specs:
        return None, ()
    place, spec = f"{directory}: {TABLE_NAME}", weights.specs[TABLE_NAME]
    shape = (model.adapter.query_grid**2, model.decoder.hidden)
    if not spec.dtype.is_floating_point:
        raise CheckpointError(f"{place}: expected floating-point numbers, found {spec}")
    if spec.shape != shape:
        raise CheckpointError(f"{place}: expected {list(shape)}, found {list(spec.shape)}")
    found = weights.read(TABLE_NAME)
    expected = published_table(model.adapter.query_grid, model.decoder.hidden, torch.float32)
    if bad := find_non_finite(TABLE_NAME, found):
        raise CheckpointError(f"{directory}: {bad}")
    difference = measure(found, expected.to(found.dtype))
    if difference.count == 0:
        return None, ()
    distances = (found.float() - expected).abs()
    largest, mean = float(distances.max()), float(distances.mean())
    apart = f"{difference.count:,} of {difference.elements:,} elements differ"
    if difference.largest <= _rounding(found):
        return None, (
            f"note: {TABLE_NAME}: {apart} in rounding from the computed ones, by {difference.largest:.2g} at most; an "
            "export writes the computed ones",
        )
    far = f"{apart}, by {largest:.2g} at most and {mean:.2g} on average"
    if mean > _LARGEST_DRIFT:
        raise CheckpointError(
            f"{place} is not the constant sin-cos table but another one: {far}; training moves it by "
            f"{_LARGEST_DRIFT} on average at most"
        )
    if not accept_drift:
        raise CheckpointError(
            f"{place} is not the constant sin-cos table: {far}. Fine-tuning with the published script does that; "
            "--accept-drift imports the weights with the constant table"
        )
    return largest, (
        f"note: {TABLE_NAME} has drifted from the constant sin-cos table: {far}; the imported model has the constant "
        "table, and so will an export",
    )


_LARGEST_DRIFT = 0.1
"""Mean difference beyond which a table is not a trained rendering of the constant one, whose elements are 0.7 in size:
AdamW moves an element by its rate a step, which is 1e-5 in the published script, so that this is 10,000 steps in one
direction."""


def _rounding(table: Tensor) -> float:
    """How far two renderings of the table may be apart: a step of its type, or what other libraries' sines and powers
    differ by in float32."""
    coarse = (torch.bfloat16, torch.float16)  # a table that was widened is as coarse as before
    kind = next((k for k in coarse if torch.equal(table.to(k).to(table.dtype), table)), table.dtype)
    return max(torch.finfo(kind).eps, _FLOAT32_TABLE)
