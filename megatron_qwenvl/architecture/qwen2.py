"""Decoder family `qwen2`: Qwen2 and Qwen2.5 with an untied output layer (7B and larger; arXiv 2412.15115)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_qwenvl.config.schema import DecoderConfig

from .qwen import Qwen
from .tower import Tower


class Qwen2(Qwen):
    """The layers of `qwen` with grouped-query attention; positions beyond the trained length go on as they are."""

    name = "qwen2"
    tokenizer_file = "tokenizer.json"
    extends_context = False

    def tower(self, decoder: DecoderConfig) -> Tower:
        """Transformer layers and final norm."""
        return replace(super().tower(decoder), query_groups=decoder.query_groups or decoder.heads)

    def problems(self, decoder: DecoderConfig) -> Iterator[str]:
        """Query heads are divided evenly over the groups."""
        if decoder.heads % (decoder.query_groups or 1):
            yield (
                f"model.decoder.heads: expected a multiple of model.decoder.query_groups ({decoder.query_groups}), "
                f"found {decoder.heads}"
            )
