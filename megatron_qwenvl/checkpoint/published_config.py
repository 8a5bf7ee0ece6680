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

_AUTO_MAP = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
}
"""Where the published code is found beside the weights."""

CODE_FILES = tuple(f"{place.split('.')[0]}.py" for place in _AUTO_MAP.values())
"""The files that `config.json` names; they import others of the published directory."""

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
        if not isinstance(visual, dict):
            raise TypeError(f"visual: expected an object, found {visual}")
        width = int(visual["width"])
        positions = specs["transformer.visual.positional_embedding"].shape[0]
        queries = specs["transformer.visual.attn_pool.query"].shape[0]
        model = ModelConfig(
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
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except (
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
    ) as error:  # a key missing, or a value of another type
        raise CheckpointError(f"{path}: not a Qwen-VL configuration: {error}") from None
    check_decoder(path, config, model.decoder)
    return model


def read_image_size(path: Path) -> int | None:
    """The image size in a Qwen-VL's `config.json` that `read_model` could read; None: not told.

    Raises:
        CheckpointError: not a number of pixels.
    """
    size = read_json(path)["visual"].get("image_size")
    if size is not None and not (isinstance(size, int) and size > 0):
        raise CheckpointError(f"{path}: visual.image_size: expected pixels, found {size}")
    return size


def check_decoder(path: Path, config: Mapping[str, Any], decoder: DecoderConfig) -> None:
    """Compare a published configuration with a decoder, in what tensors' shapes do not tell and in what they do. Keys
    that are not there are not compared.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    for key, expected in _published_decoder(decoder).items():
        found = config.get(key)
        if found is not None and found != expected:
            raise CheckpointError(f"{path}: {key}: expected {expected}, found {found}")


def _published_decoder(decoder: DecoderConfig) -> dict[str, Any]:
    """The keys that say what the decoder computes."""
    return {
        "hidden_size": decoder.hidden,
        "intermediate_size": 2 * decoder.ffn_hidden,
        "kv_channels": decoder.hidden // decoder.heads,
        "layer_norm_epsilon": decoder.norm_eps,
        "no_bias": True,
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": decoder.layers,
        "rotary_emb_base": decoder.rotary_base,
        "rotary_pct": 1.0,
        "tie_word_embeddings": False,
    }


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
        "auto_map": _AUTO_MAP,
        "attn_dropout_prob": 0.0,
        "bf16": dtype == "bfloat16",
        "emb_dropout_prob": 0.0,
        "fp16": dtype == "float16",
        "fp32": dtype == "float32",
        "initializer_range": 0.02,
        "max_position_embeddings": 8192,
        "model_type": "qwen",
        "onnx_safe": None,
        "scale_attn_weights": True,
        "seq_length": 2048,
        "tokenizer_type": "QWenTokenizer",
        "torch_dtype": dtype,
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "visual": visual,
        "vocab_size": decoder.vocab_size,
        **_published_decoder(decoder),
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


def generation_config(chat: bool) -> dict[str, Any]:
    """`generation_config.json` of Qwen-VL-Chat (ChatML, sampling) or of pre-trained Qwen-VL (plain text, greedy)."""
    common = {
        "eos_token_id": 151643,
        "max_new_tokens": 512,
        "max_window_size": 6144,
        "pad_token_id": 151643,
    }
    if chat:
        return {**common, "chat_format": "chatml", "do_sample": True, "top_k": 0, "top_p": 0.3}
    return {**common, "chat_format": "raw", "do_sample": False, "stop_words_ids": [[151643]]}
