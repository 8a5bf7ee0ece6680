"""The whole model as plain numbers, from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import gcd

from megatron_qwenvl.config.schema import DecoderConfig, ModelConfig, VisionConfig

from .adapter import AdapterShape
from .family import DecoderFamily
from .qwen import Qwen
from .qwen2 import Qwen2
from .tower import Shape, Tower
from .vit import describe_vit, patch_embedding_shapes

FAMILIES: dict[str, DecoderFamily] = {family.name: family for family in (Qwen(), Qwen2())}
"""Every value of `model.decoder.family`."""


def family_of(decoder: DecoderConfig) -> DecoderFamily:
    """The family of a decoder."""
    return FAMILIES[decoder.family]


@dataclass(frozen=True)
class Architecture:
    """Both towers, the adapter and the vocabulary."""

    vision: VisionConfig
    """Sizes of patches and positions."""
    vit: Tower
    """Image to patches."""
    adapter: AdapterShape
    """Patches to decoder tokens."""
    decoder: Tower
    """Tokens to the next ones."""
    vocab_size: int
    """Rows of the word embedding and of the output layer."""
    tied_embeddings: bool
    """Whether the output layer is the word embedding."""

    def tensor_shapes(self) -> dict[str, Shape]:
        """Full (unsharded) shape of every tensor by checkpoint key, in the order of the layers."""
        table = (self.vocab_size, self.decoder.hidden)
        shapes = {
            **patch_embedding_shapes(self.vision),
            **self.vit.tensor_shapes(),
            **self.adapter.tensor_shapes(),
            "embedding.word_embeddings.weight": table,
            **self.decoder.tensor_shapes(),
        }
        return shapes if self.tied_embeddings else {**shapes, "output_layer.weight": table}

    def divided_sizes(self) -> Iterator[tuple[str, int]]:
        """Sizes that tensor parallelism divides, by configuration field."""
        yield from ((f"model.vision.{name}", size) for name, size in self.vit.divided_sizes())
        yield "model.adapter.heads", self.adapter.heads
        yield from ((f"model.decoder.{name}", size) for name, size in self.decoder.divided_sizes())
        yield "model.decoder.vocab_size", self.vocab_size

    def tensor_parallel_sizes(self) -> list[int]:
        """All tensor-parallel sizes that the model can have."""
        common = gcd(*(size for _, size in self.divided_sizes()))
        return [size for size in range(1, common + 1) if common % size == 0]


@cache
def describe(model: ModelConfig) -> Architecture:
    """The architecture of a configuration."""
    family = family_of(model.decoder)
    decoder = family.tower(model.decoder)
    return Architecture(
        vision=model.vision,
        vit=describe_vit(model.vision),
        adapter=AdapterShape(model.vision.width, decoder.hidden, model.adapter.heads, model.image_tokens),
        decoder=decoder,
        vocab_size=model.decoder.vocab_size,
        tied_embeddings=family.tied_embeddings,
    )
