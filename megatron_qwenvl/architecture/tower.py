"""A stack of transformer layers as plain numbers: sizes, switches, and the tensors that follow from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tower:
    """A stack of equal pre-norm transformer layers: attention, then an MLP."""

    name: Literal["vit", "decoder"]
    """First part of its checkpoint keys."""
    layers: int
    """Transformer layers."""
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Query heads."""
    query_groups: int
    """Key and value heads; each serves `heads / query_groups` query heads."""
    head_size: int
    """Channels of a head."""
    ffn_hidden: int
    """Hidden size of the MLP."""
    norm: Literal["LayerNorm", "RMSNorm"]
    """Kind of every norm."""
    norm_eps: float
    """Epsilon of every norm."""
    activation: Literal["gelu", "silu"]
    """Activation of the MLP; `gelu` is the exact one."""
    gated: bool
    """Whether the MLP multiplies the activated gate with a second projection (SwiGLU with `silu`)."""
    bias: bool
    """Whether the linear layers other than QKV have biases."""
    qkv_bias: bool
    """Whether the QKV projection has a bias."""
    causal: bool
    """Whether a position attends to earlier ones only."""
    qk_norm: bool = False
    """Whether queries and keys pass an RMSNorm per head before the rotation (Qwen3)."""
    rotary_base: float | None = None
    """Base of the rotary frequencies over the whole head; None: no rotary positions."""
    final_norm: bool = False
    """Whether a norm follows the last layer."""

    @property
    def attention_width(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.head_size

    @property
    def qkv_rows(self) -> int:
        """Rows of the QKV projection, stored as `[query_groups, heads / query_groups + 2, head_size]`: the queries of
        a group, its key, its value."""
        return (self.heads + 2 * self.query_groups) * self.head_size

    @property
    def layer_weights(self) -> dict[str, Shape]:
        """Shapes of one layer's matrices, `[out, in]`, by name below the layer."""
        return {
            "self_attention.linear_qkv.weight": (self.qkv_rows, self.hidden),
            "self_attention.linear_proj.weight": (self.hidden, self.attention_width),
            "mlp.linear_fc1.weight": ((1 + self.gated) * self.ffn_hidden, self.hidden),
            "mlp.linear_fc2.weight": (self.hidden, self.ffn_hidden),
        }

    @property
    def layer_vectors(self) -> dict[str, Shape]:
        """Shapes of one layer's norms and biases. A norm is stored as part of the linear layer behind it, as
        Transformer Engine does."""
        norms = ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")
        kinds = ("weight", "bias") if self.norm == "LayerNorm" else ("weight",)
        vectors: dict[str, Shape] = {f"{norm}{kind}": (self.hidden,) for norm in norms for kind in kinds}
        for name, shape in self.layer_weights.items():
            if self.qkv_bias if "linear_qkv" in name else self.bias:
                vectors[f"{name.removesuffix('weight')}bias"] = shape[:1]
        if self.qk_norm:
            vectors |= {f"self_attention.{part}_layernorm.weight": (self.head_size,) for part in "qk"}
        return vectors

    def tensor_shapes(self) -> dict[str, Shape]:
        """Full shape of every tensor by checkpoint key."""
        layer = {**self.layer_weights, **self.layer_vectors}
        shapes = {
            f"{self.name}.layers.{i}.{name}": shape
            for i in range(self.layers)
            for name, shape in layer.items()
        }
        if self.final_norm:
            shapes[f"{self.name}.final_layernorm.weight"] = (self.hidden,)
        return shapes

    @property
    def first_products(self) -> int:
        """Multiply-adds of a position in one layer between the layer's input and weights: QKV."""
        return prod(self.layer_weights["self_attention.linear_qkv.weight"])

    @property
    def inner_products(self) -> int:
        """Multiply-adds of a position in one layer between later activations and weights."""
        return sum(prod(shape) for shape in self.layer_weights.values()) - self.first_products

    def divided_sizes(self) -> Iterator[tuple[str, int]]:
        """Sizes that tensor parallelism divides, by the configuration field of the tower's section."""
        yield "heads", self.heads
        if self.query_groups != self.heads:
            yield "query_groups", self.query_groups
        yield ("ffn_hidden" if self.name == "decoder" else "mlp_hidden"), self.ffn_hidden
