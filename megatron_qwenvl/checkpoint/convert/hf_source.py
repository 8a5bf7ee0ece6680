"""Weights in the Hugging Face format as the source of a conversion, checked against the model that they are for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_qwenvl.checkpoint.formats.hf_config import read_model
from megatron_qwenvl.checkpoint.formats.hf_files import HFWeights
from megatron_qwenvl.checkpoint.formats.names import TABLE_NAME, qwenvl_rules
from megatron_qwenvl.checkpoint.formats.position_table import check_table
from megatron_qwenvl.checkpoint.formats.rules import Rule
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.json_text import show_name
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.config.schema import ModelConfig
from megatron_qwenvl.model.shapes import tensor_shapes

from .mapped_source import MappedSource, megatron_specs

_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|logn_tensor)$")
"""Constants that some published files carry along."""


@dataclass(frozen=True)
class QwenVLDirectory:
    """A checked Qwen-VL or Qwen-VL-Chat directory."""

    mapped: MappedSource
    """Its weights with the rules of the format; the position table is not among them."""
    specs: dict[str, TensorSpec]
    """The tensors under their megatron names."""
    model: ModelConfig
    """Shape of the model, from its `config.json`."""
    table_drift: float | None
    """Largest difference of its position table from the constant one; None: rounding at most."""
    config_notes: tuple[str, ...]
    """Keys of `config.json` about which nothing is known."""
    table_notes: tuple[str, ...]
    """Differences of the position table from the constant one."""


def open_qwenvl(directory: Path, accept_drift: bool) -> QwenVLDirectory:
    """Open and check a published Qwen-VL or Qwen-VL-Chat directory.

    Args:
        directory: weights and configuration.
        accept_drift: accept a position table that was trained.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, unknown or of another shape than `config.json` says, or
            the model computes something else.
    """
    weights = HFWeights(directory)
    model, notes = read_model(directory / "config.json", weights.specs)
    rules = tuple(qwenvl_rules(model))
    check_known(directory, weights.specs.keys() - {TABLE_NAME}, rules)
    drift, table_notes = check_table(directory, weights, model, accept_drift)
    mapped = MappedSource(weights, rules)
    specs = checked_specs(directory, mapped, model)
    return QwenVLDirectory(mapped, specs, model, drift, tuple(notes), table_notes)


def check_known(place: Path, names: Iterable[str], rules: Iterable[Rule]) -> None:
    """Check that every tensor is known; one that no rule takes belongs to another model, perhaps to a deeper one.

    Args:
        place: where the tensors are, for the message.
        names: their names in the Hugging Face format.
        rules: the rules of the format.

    Raises:
        CheckpointError: naming the first unknown tensor.
    """
    known = {name for rule in rules for name in rule.hf}
    unknown = sorted(name for name in names if name not in known and not _BUFFERS.search(name))
    if unknown:
        raise CheckpointError(f"{place}: {len(unknown)} unknown tensors, the first: {show_name(unknown[0])}")


def checked_specs(place: Path | None, mapped: MappedSource, model: ModelConfig) -> dict[str, TensorSpec]:
    """Specs of the tensors under their megatron names, with the shapes that the model has.

    Args:
        place: where the tensors are, for the message; None: they are made here.
        mapped: the tensors with their rules.
        model: the model that they are for.

    Raises:
        CheckpointError: a tensor is missing, does not hold floating-point numbers or has another shape.
    """
    expected = tensor_shapes(model)
    try:
        specs = megatron_specs(mapped)
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from None
    for name, spec in specs.items():
        if not spec.dtype.is_floating_point:
            raise CheckpointError(f"{place}: {name}: expected floating-point numbers, found {spec}")
        if spec.shape != expected[name]:
            raise CheckpointError(
                f"{place}: {name}: expected {list(expected[name])}, found {list(spec.shape)}"
            )
    return specs
