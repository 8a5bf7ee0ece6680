"""The one enumeration of the model's layers.

ViT, adapter and decoder are one list: patch embedding, ViT layers, adapter, word embedding, decoder layers, head.
Freezing, layer-wise learning rates, FLOP accounting and the pipeline partition all read this list.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megatron_qwenvl.config.schema import FreezableGroup, ModelConfig

LayerKind = Literal["patch_embed", "vit", "adapter", "embedding", "decoder", "head"]


@dataclass(frozen=True)
class Layer:
    """One entry of the layer list."""

    kind: LayerKind
    index: int = 0
    """Position among the layers of its kind."""

    @property
    def part(self) -> FreezableGroup:
        """The freezable part that the layer belongs to."""
        if self.kind in ("patch_embed", "vit"):
            return "vit"
        return "adapter" if self.kind == "adapter" else "decoder"

    @property
    def name(self) -> str:
        """Readable name."""
        return f"{self.kind}.{self.index}" if self.kind in ("vit", "decoder") else self.kind


def list_layers(model: ModelConfig) -> tuple[Layer, ...]:
    """All layers in forward order: ViT layers + decoder layers + 4 entries."""
    return (
        Layer("patch_embed"),
        *(Layer("vit", i) for i in range(model.vision.layers)),
        Layer("adapter"),
        Layer("embedding"),
        *(Layer("decoder", i) for i in range(model.decoder.layers)),
        Layer("head"),
    )


_MODULES: dict[str, LayerKind] = {
    "patch_embed": "patch_embed",
    "vit": "vit",
    "adapter": "adapter",
    "embedding": "embedding",
    "decoder": "decoder",
    "output_layer": "head",
}
_KEY = re.compile(r"^(\w+?)\.(?:layers\.(\d+)\.)?")


def layer_of(key: str) -> Layer:
    """The layer that owns a tensor, by its checkpoint key.

    The decoder's final norm belongs to the head.

    Raises:
        KeyError: the key is not one of this model.
    """
    match = _KEY.match(key)
    if match is None or match[1] not in _MODULES:
        raise KeyError(f"{key}: expected a key that starts with one of {', '.join(_MODULES)}")
    if key.startswith("decoder.final_layernorm."):
        return Layer("head")
    return Layer(_MODULES[match[1]], int(match[2] or 0))


def is_adapter_output(key: str) -> bool:
    """Whether a tensor is of the adapter's final norm or projection (frozen in the published SFT code)."""
    return key.startswith(("adapter.ln_post.", "adapter.proj."))


def is_frozen(key: str, frozen: tuple[FreezableGroup, ...]) -> bool:
    """Whether a tensor is excluded from training, by its checkpoint key."""
    return layer_of(key).part in frozen or ("adapter_output" in frozen and is_adapter_output(key))


def vit_depth_from_adapter(layer: Layer, model: ModelConfig) -> int | None:
    """Steps from the adapter down into the ViT, for layer-wise learning rates.

    0 for the last ViT layer, `vision.layers` for the patch embedding and positions; None outside the ViT.
    """
    if layer.kind == "patch_embed":
        return model.vision.layers
    if layer.kind == "vit":
        return model.vision.layers - 1 - layer.index
    return None
