"""FLOP accounting of one micro-batch, layer by layer.

A multiply-add counts 2. Only matrix products and attention are counted, causal attention at half the square,
recomputation not at all ("model FLOPs"). Backward costs are counted where they are needed: the weight gradient
only for trained layers, the input gradient only where something trained lies below, both gradients of attention
with either.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_qwenvl.architecture.model import Architecture, describe
from megatron_qwenvl.architecture.tower import Tower
from megatron_qwenvl.config.schema import DataConfig, FreezableGroup, ModelConfig

from .layers import Layer, list_layers


@dataclass(frozen=True)
class Workload:
    """The work of a micro-batch (or of a step)."""

    images: float
    """Number of images."""
    patches: int
    """Patches per image."""
    tokens: float
    """Number of decoder positions."""
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
    """FLOPs of a layer's forward pass, grouped by the gradients that they need in the backward pass."""

    first: float
    """Products of the layer's input with weights."""
    inner: float = 0.0
    """Products of later activations of the layer with weights."""
    attention: float = 0.0
    """Products of activations with activations."""

    @property
    def forward(self) -> float:
        return self.first + self.inner + self.attention

    def backward(self, trained: bool, trained_below: bool) -> float:
        """FLOPs of the backward pass.

        A weight gradient costs as much as its product, and so does an input gradient; inside a trained layer input
        gradients lead to its earlier weights. Attention has a gradient for each of its two factors.
        """
        passed_on = trained or trained_below
        weights = (self.first + self.inner) if trained else 0.0
        inputs = (self.inner if passed_on else 0.0) + (self.first if trained_below else 0.0)
        return weights + inputs + (2 * self.attention if passed_on else 0.0)


def _products(layer: Layer, architecture: Architecture, work: Workload) -> _Products:
    vit, adapter, decoder = architecture.vit, architecture.adapter, architecture.decoder
    patches = work.images * work.patches
    if layer.kind == "patch_embed":
        return _Products(2 * patches * 3 * architecture.vision.patch_size**2 * vit.hidden)
    if layer.kind == "vit":
        return _layer_products(vit, patches, patches * work.patches)
    if layer.kind == "adapter":
        return _Products(*(2 * count for count in adapter.products(work.images, work.patches)))
    if layer.kind == "embedding":
        return _Products(0.0)
    if layer.kind == "decoder":
        return _layer_products(decoder, work.tokens, work.attention_pairs / 2)  # causal: half the square
    return _Products(2 * work.loss_tokens * decoder.hidden * architecture.vocab_size)


def _layer_products(tower: Tower, positions: float, pairs: float) -> _Products:
    """One transformer layer; `pairs` of positions attend to each other, by two products over all query heads."""
    return _Products(
        first=2 * positions * tower.first_products,
        inner=2 * positions * tower.inner_products,
        attention=2 * 2 * pairs * tower.attention_width,
    )


def forward_flops(layer: Layer, model: ModelConfig, work: Workload) -> float:
    """Floating-point operations of one layer's forward pass over `work`."""
    return _products(layer, describe(model), work).forward


def layer_flops(model: ModelConfig, frozen: tuple[FreezableGroup, ...], work: Workload) -> list[float]:
    """Forward and backward FLOPs of every layer of `list_layers(model)` under a frozen set.

    `adapter_output` does not change the count: it is 0.02% of the model.
    """
    costs, trained_below = [], False
    for layer in list_layers(model):
        products, trained = _products(layer, describe(model), work), layer.part not in frozen
        costs.append(products.forward + products.backward(trained, trained_below))
        trained_below |= trained
    return costs


def total_flops(model: ModelConfig, frozen: tuple[FreezableGroup, ...], work: Workload) -> float:
    """Training FLOPs of the whole model over `work`."""
    return sum(layer_flops(model, frozen, work))
