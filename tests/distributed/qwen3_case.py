"""A third decoder family, as docs/families.md adds one: Qwen3, with norms of queries and keys and no bias at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_qwenvl.architecture.model import FAMILIES
from megatron_qwenvl.architecture.qwen2 import Qwen2
from megatron_qwenvl.architecture.tower import Tower
from megatron_qwenvl.checkpoint.formats.hf_families import HF_DECODERS
from megatron_qwenvl.checkpoint.formats.hf_qwen2 import HFQwen2
from megatron_qwenvl.config.schema import DecoderConfig, ModelConfig

from .model_cases import SMALL_QWEN2


class Qwen3(Qwen2):
    """Description: what differs from Qwen2."""

    name = "qwen3"

    def tower(self, decoder: DecoderConfig) -> Tower:
        return replace(super().tower(decoder), qkv_bias=False, qk_norm=True)


class HFQwen3(HFQwen2):
    """Hugging Face format: what differs from Qwen2's."""

    family = "qwen3"  # type: ignore[assignment]
    model_type = "qwen3"
    class_part = "Qwen3"
    states_head_size = True
    defaults = {**HFQwen2.defaults, "head_dim": 128}  # noqa: RUF012
    pretrained_model = "Qwen3-8B-Base"
    chat_model = "Qwen3-8B"
    layer_tensors = {  # noqa: RUF012
        **HFQwen2.layer_tensors,
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    }


SMALL_QWEN3: ModelConfig = SMALL_QWEN2.model_copy(
    update={"decoder": SMALL_QWEN2.decoder.model_copy(update={"family": "qwen3"})}
)
"""The schema does not know the family: a configuration of it cannot be loaded, only made here."""


def add_qwen3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the family for one test."""
    monkeypatch.setitem(FAMILIES, "qwen3", Qwen3())
    monkeypatch.setitem(HF_DECODERS, "qwen3", HFQwen3())


def random_qwen3(decoder: DecoderConfig) -> Qwen3ForCausalLM:
    """transformers' Qwen3 with random weights, norms included."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=decoder.hidden,
        intermediate_size=decoder.ffn_hidden,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.query_groups,
        head_dim=decoder.hidden // decoder.heads,
        vocab_size=decoder.vocab_size,
        rms_norm_eps=decoder.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(decoder.rotary_base)},
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
            if parameter.dim() == 1:
                parameter.add_(0.7)
    return model
