"""`config.json` and `generation_config.json` of the published Qwen-VL: from them to our model shape and back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_qwenvl.config.schema import AdapterConfig, DecoderConfig, ModelConfig, VisionConfig

from .files import CheckpointError
from .manifest import Published
from .model_checks import DECODER_NAMES, IMAGE_START, decoder_problems, visual_problems
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
        CheckpointError: naming every key that is missing, wrong, or asks for something that is not computed here.
    """
    config = read_json(path)
    if missing := _missing_keys(config):
        raise CheckpointError(f"{path}: not a Qwen-VL configuration: missing {', '.join(missing)}")
    for name in (_POSITIONS, _QUERY):
        if name not in specs or not specs[name].shape:
            first = min(specs, default="none")
            raise CheckpointError(
                f"{path.parent}: tensor {name} is missing among {len(specs)}, the first: {first}"
            )
    try:
        model = _model_of(config, specs)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, at['loc']))}: {at['msg']}" for at in error.errors()]
        raise CheckpointError(f"{path}: {'; '.join(problems)}") from None
    except (
        TypeError,
        ValueError,
        ArithmeticError,
    ) as error:  # a value of another type
        raise CheckpointError(f"{path}: not a Qwen-VL configuration: {error}") from None
    problems = [*decoder_problems(path, config, model.decoder)[0]]
    problems += visual_problems(path, config["visual"], model)[0]
    if problems:
        raise CheckpointError("; ".join(problems))
    return model


def read_notes(path: Path, model: ModelConfig) -> tuple[str, ...]:
    """What a `config.json` says that nothing is known about, after `read_model`."""
    unknown = visual_problems(path, read_json(path)["visual"], model)[1]
    return tuple(f"note: {path}: visual.{name} is not known and not regarded" for name in unknown)


_POSITIONS = "transformer.visual.positional_embedding"
_QUERY = "transformer.visual.attn_pool.query"
_VISUAL_KEYS = ("width", "layers", "heads", "mlp_ratio", "patch_size")


def _missing_keys(config: Mapping[str, Any]) -> list[str]:
    missing = [names[0] for names in (*DECODER_NAMES.values(), _VOCABULARY) if _first(config, names) is None]
    visual = config.get("visual")
    if not isinstance(visual, dict):
        return [*missing, "visual (an object)"]
    missing += [f"visual.{key}" for key in _VISUAL_KEYS if key not in visual]
    if "adapter_heads" not in visual and "output_dim" not in visual:
        missing.append("visual.output_dim")
    return missing


_VOCABULARY = ("padded_vocab_size", "vocab_size")
"""The first that is there is the number of rows."""


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value under the first of the names that is there."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def _model_of(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> ModelConfig:
    visual = config["visual"]
    width = int(visual["width"])
    positions, queries = specs[_POSITIONS].shape[0], specs[_QUERY].shape[0]
    values = {name: _first(config, names) for name, names in DECODER_NAMES.items()}
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
            heads=visual.get("adapter_heads", visual.get("output_dim", 0) // _HEAD_WIDTH),
        ),
        decoder=DecoderConfig(
            layers=values["layers"],
            hidden=values["hidden"],
            heads=values["heads"],
            ffn_hidden=values["intermediate"] // 2,
            vocab_size=_first(config, _VOCABULARY),
            rotary_base=values["rotary_base"],
            norm_eps=values["norm_eps"],
        ),
    )


def read_image_size(path: Path) -> int | None:
    """The image size in a Qwen-VL's `config.json` that `read_model` could read; None: not told.

    Raises:
        CheckpointError: not a number of pixels.
    """
    size = read_json(path)["visual"].get("image_size")
    if size is not None and not (isinstance(size, int) and size > 0):
        raise CheckpointError(f"{path}: visual.image_size: expected pixels, found {size}")
    return size


_KEPT = (
    "attn_dropout_prob", "bos_token_id", "emb_dropout_prob", "eos_token_id", "initializer_range",
    "max_position_embeddings", "onnx_safe", "pad_token_id", "softmax_in_fp32", "tokenizer_class",
    "tokenizer_type", "use_cache", "use_cache_kernel", "use_cache_quantization", "use_flash_attn",
)  # fmt: skip
"""Keys of `config.json` that an export gives back. None of them names code."""


def read_published(directory: Path) -> Published:
    """What a Qwen or Qwen-VL directory says beside its weights.

    Raises:
        CheckpointError: a file is not JSON, or a value is of another type.
    """
    path, generation = directory / "config.json", directory / "generation_config.json"
    config = read_json(path)
    context = {
        key: config[key] for key in ("seq_length", "use_dynamic_ntk", "use_logn_attn") if key in config
    }
    kept = {key: config[key] for key in _KEPT if key in config}
    _check_plain(path, kept)
    generated = read_json(generation) if generation.is_file() else None
    if generated is not None:
        _check_plain(generation, generated)
        generated = {
            key: value for key, value in generated.items() if not key.startswith(("_", "transformers"))
        }
    try:
        known = {"config": kept, "generation": generated, "tokenizer": tokenizer_digest(directory)}
        return Published.model_validate({**context, **known}, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


TOKENIZER_FILE = "qwen.tiktoken"


def tokenizer_digest(directory: Path) -> str | None:
    """SHA-256 of a directory's vocabulary; None: it has none."""
    path = directory / TOKENIZER_FILE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _check_plain(path: Path, content: object) -> None:
    """Python reads NaN and Infinity, which are no JSON and could not be compared."""
    if isinstance(content, float) and not math.isfinite(content):
        raise CheckpointError(f"{path}: not JSON: holds {content}")
    for part in (
        content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    ):
        _check_plain(path, part)


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


def published_config(
    model: ModelConfig, image_size: int, dtype: str, published: Published | None = None
) -> dict[str, Any]:
    """`config.json` for the published `QWenLMHeadModel` code; `published` is what is known of the weights' origin."""
    published = published or Published()
    vision, adapter, decoder = model.vision, model.adapter, model.decoder
    visual: dict[str, Any] = {
        "heads": vision.heads,
        "image_size": image_size,
        "image_start_id": IMAGE_START,
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
        "seq_length": published.seq_length,
        "tokenizer_type": "QWenTokenizer",
        "torch_dtype": dtype,
        "use_cache": True,
        "use_dynamic_ntk": published.use_dynamic_ntk,
        "use_flash_attn": "auto",
        "use_logn_attn": published.use_logn_attn,
        "visual": visual,
        "vocab_size": decoder.vocab_size,
        **{key: published.config[key] for key in _KEPT if key in published.config},
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


def generation_config(chat: bool, published: Published | None = None) -> dict[str, Any]:
    """`generation_config.json`: the origin's own where that is of the kind asked for, else the published Qwen-VL-Chat's
    (ChatML, sampling) or the pre-trained Qwen-VL's (plain text, greedy)."""
    if published is not None and published.generation is not None and published.chats == chat:
        return published.generation
    common = {
        "eos_token_id": 151643,
        "max_new_tokens": 512,
        "max_window_size": 6144,
        "pad_token_id": 151643,
    }
    if chat:
        return {**common, "chat_format": "chatml", "do_sample": True, "top_k": 0, "top_p": 0.3}
    return {**common, "chat_format": "raw", "do_sample": False, "stop_words_ids": [[151643]]}
