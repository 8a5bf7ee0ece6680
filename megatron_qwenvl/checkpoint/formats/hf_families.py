"""The decoder families in the Hugging Face format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_qwenvl.config.schema import DecoderConfig

from .hf_decoder import HFDecoder
from .hf_qwen import HFQwen
from .hf_qwen2 import HFQwen2

HF_DECODERS: dict[str, HFDecoder] = {known.family: known for known in (HFQwen(), HFQwen2())}
"""Every value of `model.decoder.family`."""


def hf_decoder(decoder: DecoderConfig) -> HFDecoder:
    """The format of a decoder's family."""
    return HF_DECODERS[decoder.family]


def hf_decoder_of(config: Mapping[str, Any]) -> HFDecoder:
    """The format of a `config.json`, by its `model_type`; without a known one Qwen's, whose comparison names it."""
    found = (known for known in HF_DECODERS.values() if known.model_type == config.get("model_type"))
    return next(found, HF_DECODERS["qwen"])
