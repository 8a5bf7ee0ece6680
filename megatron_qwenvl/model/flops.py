"""FLOP accounting of one micro-batch, layer by layer.

A multiply-add counts 2. Only matrix products and attention are counted, causal attention at half the square,
recomputation not at all ("model FLOPs"). Backward costs are counted where they are needed: the weight gradient
only for trained layers, the input gradient only where something trained lies below, both gradients of attention
with either.
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


@dataclass(frozen=True)
class _Products:
    """FLOPs of a layer's forward pass by what their backward pass needs."""

    first: float
    """Products of the layer's input with weights."""
    inner: float = 0.0
    """Products of what the layer has computed with weights."""
    attention: float = 0.0
    """Products of activations with activations."""

    @property
    def forward(self) -> float:
        return self.first + self.inner + self.attention

    def backward(self, trained: bool, trained_below: bool) -> float:
        """A weight gradient costs as much as its product, and so does an input gradient; inside a trained layer
        input gradients lead to its earlier weights. Attention has a gradient for each of its two factors."""
        passed_on = trained or trained_below
        weights = (self.first + self.inner) if trained else 0.0
        inputs = (self.inner if passed_on else 0.0) + (self.first if trained_below else 0.0)
        return weights + inputs + (2 * self.attention if passed_on else 0.0)


def _products(layer: Layer, model: ModelConfig, work: Workload) -> _Products:
    vision, decoder, hidden = model.vision, model.decoder, model.decoder.hidden
    width, patches = vision.width, work.images * work.patches
    if layer.kind == "patch_embed":
        return _Products(2 * patches * 3 * vision.patch_size**2 * width)
    if layer.kind == "vit":
        return _Products(
            first=2 * patches * 3 * width**2,
            inner=2 * patches * (width**2 + 2 * width * vision.mlp_hidden),
            attention=4 * patches * work.patches * width,
        )
    if layer.kind == "adapter":
        queries = work.images * model.image_tokens
        learned = model.image_tokens if work.images else 0  # projected once for all images
        return _Products(
            first=2 * patches * width * hidden,
            inner=2 * (2 * patches + 2 * queries + learned) * hidden**2,
            attention=4 * queries * work.patches * hidden,
        )
    if layer.kind == "embedding":
        return _Products(0.0)
    if layer.kind == "decoder":
        return _Products(
            first=2 * work.tokens * 3 * hidden**2,
            inner=2 * work.tokens * (hidden**2 + 3 * hidden * decoder.ffn_hidden),
            attention=2 * work.attention_pairs * hidden,
        )
    return _Products(2 * work.loss_tokens * hidden * decoder.vocab_size)


def forward_flops(layer: Layer, model: ModelConfig, work: Workload) -> float:
    """Floating-point operations of one layer's forward pass over `work`."""
    return _products(layer, model, work).forward


def layer_flops(model: ModelConfig, frozen: tuple[FreezableGroup, ...], work: Workload) -> list[float]:
    """Forward and backward FLOPs of every layer of `list_layers(model)` under a frozen set.

    `adapter_output` does not change the count: it is 0.02% of the model.
    """
    costs, trained_below = [], False
    for layer in list_layers(model):
        products, trained = _products(layer, model, work), layer.part not in frozen
        costs.append(products.forward + products.backward(trained, trained_below))
        trained_below |= trained
    return costs


def total_flops(model: ModelConfig, frozen: tuple[FreezableGroup, ...], work: Workload) -> float:
    """Training FLOPs of the whole model over `work`."""
    return sum(layer_flops(model, frozen, work))
