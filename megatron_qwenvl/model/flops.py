"""FLOP accounting of one micro-batch, layer by layer.

A multiply-add counts 2. Only matrix products and attention are counted, causal attention at half the square,
recomputation not at all ("model FLOPs"). Backward costs are counted where they happen: the weight gradient only
for trained layers, the input gradient only where something trained lies below.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_qwenvl.config.schema import DataConfig, FreezableGroup, ModelConfig

from .layers import Layer, list_layers


@dataclass(frozen=True)
class Workload:
    """What a micro-batch (or a step) asks of the model."""

    images: float
    """Images."""
    patches: int
    """Patches of one image."""
    tokens: float
    """Decoder positions."""
    attention_pairs: float
    """Sum over attention segments of length^2."""
    loss_tokens: float
    """Positions that the head computes logits for."""


def expected_workload(model: ModelConfig, data: DataConfig, rows: int = 1) -> Workload:
    """A typical micro-batch, for the pipeline partition before any data is read.

    A sample is taken to be one image and as much text as a short caption (32 tokens), packed samples fill the
    pack, and `rows` unpacked samples are padded rows.
    """
    sample = min(model.image_tokens + 2 + 32, data.max_sample_length)
    patches = (data.image_size // model.vision.patch_size) ** 2
    if data.packing == "none":
        length = data.max_sample_length
        return Workload(rows, patches, rows * length, rows * length**2, rows * 32)
    samples = max(1, data.pack_length // sample)
    squares = data.pack_length**2 if data.packing == "interleaved" else samples * sample**2
    return Workload(samples, patches, data.pack_length, squares, samples * 32)


def forward_flops(layer: Layer, model: ModelConfig, work: Workload) -> float:
    """Floating-point operations of one layer's forward pass over `work`."""
    vision, hidden = model.vision, model.decoder.hidden
    patches = work.images * work.patches
    if layer.kind == "patch_embed":
        return 2 * patches * 3 * vision.patch_size**2 * vision.width
    if layer.kind == "vit":
        linear = 2 * patches * (4 * vision.width**2 + 2 * vision.width * vision.mlp_hidden)
        return linear + 4 * patches * work.patches * vision.width
    if layer.kind == "adapter":
        queries = work.images * model.image_tokens
        linear = 2 * patches * (vision.width * hidden + 2 * hidden**2) + 2 * queries * 2 * hidden**2
        return linear + 2 * model.image_tokens * hidden**2 + 4 * queries * work.patches * hidden
    if layer.kind == "embedding":
        return 0.0
    if layer.kind == "decoder":
        linear = 2 * work.tokens * (4 * hidden**2 + 3 * hidden * model.decoder.ffn_hidden)
        return linear + 2 * work.attention_pairs * hidden
    return 2 * work.loss_tokens * hidden * model.decoder.vocab_size


def layer_flops(model: ModelConfig, frozen: tuple[FreezableGroup, ...], work: Workload) -> list[float]:
    """Forward and backward FLOPs of every layer of `list_layers(model)` under a frozen set.

    `adapter_output` does not change the count: it is 0.02% of the model.
    """
    costs, trained_below = [], False
    for layer in list_layers(model):
        forward = forward_flops(layer, model, work)
        trained = layer.part not in frozen
        backward = (forward if trained else 0.0) + (forward if trained_below else 0.0)
        costs.append(forward + backward)
        trained_below |= trained
    return costs


def total_flops(model: ModelConfig, frozen: tuple[FreezableGroup, ...], work: Workload) -> float:
    """Training FLOPs of the whole model over `work`."""
    return sum(layer_flops(model, frozen, work))
