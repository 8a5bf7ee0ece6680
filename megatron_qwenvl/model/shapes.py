"""Shapes of every tensor of the model under its checkpoint key, and the counts of parameters and bytes that follow."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one replica of a run's model, summed over its tensor- and pipeline-parallel ranks."""

    weights: int
    """Weights in the training precision."""
    gradients: int
    """fp32 gradients of the trained parameters."""
    optimizer: int
    """Two fp32 moments and the fp32 master weights of the trained parameters; unsharded fp32 weights need no master."""


def state_bytes(config: RunConfig) -> StateBytes:
    """Bytes of weights, gradients and optimizer state, from the configuration alone."""
    counts = count_parameters(config).values()
    elements, trained = sum(total for total, _ in counts), sum(trained for _, trained in counts)
    bf16 = config.train.precision == "bf16"
    has_master = bf16 or config.optimizer.sharded
    return StateBytes(elements * (2 if bf16 else 4), trained * 4, trained * (12 if has_master else 8))


def describe_parameters(config: RunConfig) -> str:
    """One line: elements per part and how many are trained, and the bytes of a replica."""
    counts = count_parameters(config)

    def state(total: int, trained: int) -> str:
        if trained == 0:
            return "frozen"
        return "trained" if trained == total else f"{trained:,} trained"

    parts = ", ".join(
        f"{part} {total:,} ({state(total, trained)})" for part, (total, trained) in counts.items()
    )
    total, trained = (sum(count[i] for count in counts.values()) for i in (0, 1))
    size = state_bytes(config)
    gigabytes = (
        f"weights {size.weights / 1e9:.3g} GB, gradients {size.gradients / 1e9:.3g} GB, "
        f"optimizer state {size.optimizer / 1e9:.3g} GB before sharding"
    )
    return f"parameters: {total:,} in all, {trained:,} trained: {parts}; {gigabytes}"
