"""Small Qwen2 directories, written by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_qwenvl.config.schema import DecoderConfig, ModelConfig, RunConfig
from tests.distributed.model_cases import SMALL_QWEN2

from .hf_cases import open_clip_weights

RUN = RunConfig(model=SMALL_QWEN2)


def qwen2_config(decoder: DecoderConfig, **changes: Any) -> Qwen2Config:
    """transformers' configuration of a decoder."""
    return Qwen2Config(
        **{
            "hidden_size": decoder.hidden,
            "intermediate_size": decoder.ffn_hidden,
            "num_hidden_layers": decoder.layers,
            "num_attention_heads": decoder.heads,
            "num_key_value_heads": decoder.query_groups,
            "vocab_size": decoder.vocab_size,
            "rms_norm_eps": decoder.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": float(decoder.rotary_base)},
            "tie_word_embeddings": False,
            "max_position_embeddings": 4096,
            **changes,
        }
    )


def random_qwen2(decoder: DecoderConfig, seed: int = 0) -> Qwen2ForCausalLM:
    """transformers' Qwen2 with random weights, norms and biases included."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(qwen2_config(decoder)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
            if parameter.dim() == 1:
                parameter.add_(0.7)
    return model


def write_qwen2_parts(folder: Path, model: ModelConfig = SMALL_QWEN2) -> tuple[Path, Path]:
    """An OpenCLIP file's directory and a Qwen2 directory as transformers saves it."""
    vit, llm = folder / "vit", folder / "llm"
    vit.mkdir(parents=True)
    save_file(open_clip_weights(model), vit / "open_clip_model.safetensors")
    random_qwen2(model.decoder).save_pretrained(llm)
    return vit, llm


def change_config(llm: Path, **changes: Any) -> None:
    """Change keys of a directory's `config.json`; None removes one."""
    path = llm / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
