"""The adapter's constant position table: a tensor of the Hugging Face format, computed by this project, never stored.

The published fine-tuning script trains everything below `attn_pool`, and the table, meant to be constant, lies there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_qwenvl.checkpoint.storage.differences import measure_difference
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.non_finite import find_non_finite
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.config.schema import ModelConfig
from megatron_qwenvl.model.positions import sincos_table

from .hf_files import HFWeights
from .names import TABLE_NAME

_FLOAT32_TABLE = 1e-5
"""Largest difference of position tables of up to 16 rows between libraries; measured: 2e-6."""


class PositionTable:
    """The constant table as a tensor source of its own."""

    def __init__(self, model: ModelConfig, specs: Mapping[str, TensorSpec]) -> None:
        self._grid = model.adapter.query_grid
        query = specs.get("adapter.query", TensorSpec((0, model.decoder.hidden), torch.float32))
        self._spec = TensorSpec((self._grid**2, model.decoder.hidden), query.dtype)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The one tensor."""
        return {TABLE_NAME: self._spec}

    def read(self, name: str) -> Tensor:
        """Compute the table."""
        return sincos_table(self._grid, self._spec.shape[1]).to(self._spec.dtype)


def check_table(
    directory: Path, weights: HFWeights, model: ModelConfig, accept_drift: bool
) -> tuple[float | None, tuple[str, ...]]:
    """Check that the position table of a published directory is the constant one, as the imported model will use that.

    Returns:
        Largest difference from it, if more than rounding, and notes if the table is not the same to the bit.
    """
    if TABLE_NAME not in weights.specs:
        return None, ()
    place = f"{directory}: {TABLE_NAME}"
    found = _read_table(directory, weights, model)
    expected = sincos_table(model.adapter.query_grid, model.decoder.hidden)
    difference = measure_difference(found, expected.to(found.dtype))
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
            "--accept_drift imports the weights with the constant table"
        )
    return largest, (
        f"note: {TABLE_NAME} has drifted from the constant sin-cos table: {far}; the imported model has the constant "
        "table, and so will an export",
    )


def _read_table(directory: Path, weights: HFWeights, model: ModelConfig) -> Tensor:
    """Read the table; raises if it is not finite numbers in the model's shape."""
    place, spec = f"{directory}: {TABLE_NAME}", weights.specs[TABLE_NAME]
    shape = (model.adapter.query_grid**2, model.decoder.hidden)
    if not spec.dtype.is_floating_point:
        raise CheckpointError(f"{place}: expected floating-point numbers, found {spec}")
    if spec.shape != shape:
        raise CheckpointError(f"{place}: expected {list(shape)}, found {list(spec.shape)}")
    found = weights.read(TABLE_NAME)
    if bad := find_non_finite(TABLE_NAME, found):
        raise CheckpointError(f"{directory}: {bad}")
    return found


_LARGEST_DRIFT = 0.1
"""Mean difference beyond which a table has not come from the constant one by training. Its elements are 0.7 in size:
AdamW moves an element by its rate a step, which is 1e-5 in the published script, so that this is 10,000 steps in one
direction."""


def _rounding(table: Tensor) -> float:
    """Largest difference between two computations of the table: one step of its type, or the difference of other
    libraries' sines and powers in float32."""
    coarse = (torch.bfloat16, torch.float16)  # a table that was widened is as coarse as before
    kind = next((k for k in coarse if torch.equal(table.to(k).to(table.dtype), table)), table.dtype)
    return max(torch.finfo(kind).eps, _FLOAT32_TABLE)
