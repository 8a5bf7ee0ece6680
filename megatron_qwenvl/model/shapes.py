"""Shapes of every tensor of the model under its checkpoint key, and what follows from them: parameter counts."""

from __future__ import annotations

from math import prod

from megatron_qwenvl.architecture.model import describe
from megatron_qwenvl.architecture.tower import Shape
from megatron_qwenvl.config.schema import ModelConfig, RunConfig

from .layers import is_frozen, layer_of


def tensor_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Full (unsharded) shape of every tensor by checkpoint key, from the configuration alone."""
    return describe(model).tensor_shapes()


def count_parameters(config: RunConfig) -> dict[str, tuple[int, int]]:
    """Elements and trained elements by part ("vit", "adapter", "decoder").

    The adapter's constant sin-cos table is not a parameter and not counted.
    """
    counts = {"vit": (0, 0), "adapter": (0, 0), "decoder": (0, 0)}
    for key, shape in tensor_shapes(config.model).items():
        total, trained = counts[layer_of(key).part]
        own = 0 if is_frozen(key, config.train.frozen) else prod(shape)
        counts[layer_of(key).part] = (total + prod(shape), trained + own)
    return counts


def describe_parameters(config: RunConfig) -> str:
    """One line: elements per part and how many are trained."""
    counts = count_parameters(config)

    def state(total: int, trained: int) -> str:
        if trained == 0:
            return "frozen"
        return "trained" if trained == total else f"{trained:,} trained"

    parts = ", ".join(
        f"{part} {total:,} ({state(total, trained)})" for part, (total, trained) in counts.items()
    )
    total, trained = (sum(count[i] for count in counts.values()) for i in (0, 1))
    return f"parameters: {total:,} in all, {trained:,} trained: {parts}"
