"""`config.json` of the published Qwen-VL: from it to our model shape and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_qwenvl.config.schema import AdapterConfig, DecoderConfig, ModelConfig, VisionConfig

from .files import CheckpointError
from .published import read_json
from .stream import TensorSpec

_HEAD_WIDTH = 128
"""The published code gives its adapter one head per 128 channels; `adapter_heads` is our addition."""


def read_model(path: Path, specs: Mapping[str, TensorSpec]) -> ModelConfig:
    """The model shape of a published Qwen-VL directory.

    Args:
        path: its `config.json`.
        specs: its tensors; they give the sizes that the published configuration leaves out.

    Raises:
        CheckpointError: a key is missing or wrong.
    """
    config = read_json(path)
    try:
        visual = config["visual"]
        width = int(visual["width"])
        positions = specs["transformer.visual.positional_embedding"].shape[0]
        queries = specs["transformer.visual.attn_pool.query"].shape[0]
        return ModelConfig(
            vision=VisionConfig(
                layers=visual["layers"],
                width=width,
                heads=visual["heads"],
                mlp_hidden=int(width * visual["mlp_ratio"]),
                patch_size=visual["patch_size"],
                position_grid=math.isqrt(positions),
            ),
            adapter=AdapterConfig(
                query_grid=math.isqrt(queries),
                heads=visual.get("adapter_heads", visual["output_dim"] // _HEAD_WIDTH),
            ),
            decoder=DecoderConfig(
                layers=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                heads=config["num_attention_heads"],
                ffn_hidden=config["intermediate_size"] // 2,
                vocab_size=config["vocab_size"],
                rotary_base=int(config["rotary_emb_base"]),
                norm_eps=config["layer_norm_epsilon"],
            ),
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a Qwen-VL configuration: {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def published_config(model: ModelConfig, image_size: int, dtype: str) -> dict[str, Any]:
    """`config.json` for the published `QWenLMHeadModel` code."""
    vision, adapter, decoder = model.vision, model.adapter, model.decoder
    visual: dict[str, Any] = {
        "heads": vision.heads,
        "image_size": image_size,
        "image_start_id": 151857,
        "layers": vision.layers,
        "mlp_ratio": _mlp_ratio(vision.width, vision.mlp_hidden),
        "n_queries": adapter.query_grid**2,
        "output_dim": decoder.hidden,
        "patch_size": vision.patch_size,
        "width": vision.width,
    }
    if adapter.heads != decoder.hidden // _HEAD_WIDTH:
        visual["adapter_heads"] = adapter.heads
    return {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "attn_dropout_prob": 0.0,
        "bf16": dtype == "bfloat16",
        "emb_dropout_prob": 0.0,
        "fp16": dtype == "float16",
        "fp32": dtype == "float32",
        "hidden_size": decoder.hidden,
        "initializer_range": 0.02,
        "intermediate_size": 2 * decoder.ffn_hidden,
        "kv_channels": decoder.hidden // decoder.heads,
        "layer_norm_epsilon": decoder.norm_eps,
        "max_position_embeddings": 8192,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": decoder.layers,
        "onnx_safe": None,
        "rotary_emb_base": decoder.rotary_base,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 2048,
        "tie_word_embeddings": False,
        "tokenizer_type": "QWenTokenizer",
        "torch_dtype": dtype,
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "visual": visual,
        "vocab_size": decoder.vocab_size,
    }


def published_limits(model: ModelConfig) -> list[str]:
    """Where the model is of a shape that the published code does not compute; empty for the published shape."""
    found = []
    if model.vision.position_grid != 16:
        found.append(f"its ViT has 16x16 positions, this model {model.vision.position_grid} squared")
    if model.adapter.heads != model.decoder.hidden // _HEAD_WIDTH:
        found.append(
            f"its adapter has one head per {_HEAD_WIDTH} channels, this one {model.adapter.heads} heads"
        )
    if model.vision.norm_eps != 1e-6 or model.adapter.norm_eps != 1e-6:
        found.append("its vision norms have epsilon 1e-6")
    return found


def _mlp_ratio(width: int, hidden: int) -> float:
    """The shortest ratio with int(width * ratio) == hidden, as the published code computes the hidden size."""
    for digits in range(1, 16):
        ratio = math.ceil(hidden / width * 10**digits) / 10**digits
        if int(width * ratio) == hidden:
            return ratio
    raise CheckpointError(f"no mlp_ratio gives {hidden} from width {width}")


def generation_config() -> dict[str, Any]:
    """`generation_config.json` of a pre-trained (not chat) Qwen-VL: greedy, stops at `<|endoftext|>`."""
    return {
        "do_sample": False,
        "eos_token_id": 151643,
        "max_new_tokens": 512,
        "pad_token_id": 151643,
        "stop_words_ids": [[151643]],
        "chat_format": "raw",
        "max_window_size": 6144,
    }
