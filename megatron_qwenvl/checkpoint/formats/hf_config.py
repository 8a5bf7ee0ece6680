"""`config.json` and `generation_config.json` of Qwen-VL in the Hugging Face format, to a `ModelConfig` and back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.json_text import show_json, show_name
from megatron_qwenvl.checkpoint.storage.manifest import HFMetadata
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.config.schema import AdapterConfig, DecoderConfig, ModelConfig, VisionConfig

from .config_comparison import is_number
from .config_keys import NAMES
from .hf_families import hf_decoder, hf_decoder_of
from .hf_files import read_json
from .model_checks import compare_visual

_HEAD_WIDTH = 128
"""Channels per head of the adapter in the published code; the key `adapter_heads` is this project's addition."""


def read_model(path: Path, specs: Mapping[str, TensorSpec]) -> tuple[ModelConfig, list[str]]:
    """Read the model shape of a published Qwen-VL directory.

    Args:
        path: its `config.json`.
        specs: its tensors; they give the sizes that the configuration leaves out.

    Returns:
        The model, and notes of keys about which nothing is known.

    Raises:
        CheckpointError: naming every key that is missing, wrong, or asks for something that is not computed here.
    """
    config = read_json(path)
    if missing := _missing_keys(config):
        raise CheckpointError(f"{path}: not a Qwen-VL configuration: missing {', '.join(missing)}")
    if wrong := _not_numbers(config):
        raise CheckpointError("; ".join(f"{path}: {problem}" for problem in wrong))
    for name in (_POSITIONS, _QUERY):
        if name not in specs or not specs[name].shape:
            first = show_name(min(specs, default="none"))
            raise CheckpointError(
                f"{path.parent}: tensor {name} is missing among {len(specs)}, the first: {first}"
            )
    if wrong := _other_layers(config, specs):
        raise CheckpointError("; ".join(f"{path}: {problem}" for problem in wrong))
    try:
        model = _model_of(config, specs)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, at['loc']))}: {at['msg']}" for at in error.errors()]
        raise CheckpointError(f"{path}: {'; '.join(problems)}") from None
    found = hf_decoder(model.decoder).compare(path, config, model.decoder)
    found.add(compare_visual(path, config["visual"], model))
    if found.problems:
        raise CheckpointError("; ".join(found.problems))
    return model, found.notes


_POSITIONS = "transformer.visual.positional_embedding"
_QUERY = "transformer.visual.attn_pool.query"
_VISUAL_KEYS = ("width", "layers", "heads", "mlp_ratio", "patch_size")
_FRACTIONS = ("norm_eps", "rotary_base", "mlp_ratio")
"""Values that need not be whole numbers."""

_NEEDED = {
    "layers": NAMES["layers"],
    "hidden": NAMES["width"],
    "heads": NAMES["heads"],
    "intermediate": NAMES["mlp"],
    "norm_eps": NAMES["norm_eps"],
    "rotary_base": NAMES["rotary_base"],
    "vocabulary": ("padded_vocab_size", "vocab_size"),
}
"""Keys that give the decoder its shape. The first name that is present counts; the comparison checks the others."""


def _needed(config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Names of all keys without which the decoder of a `config.json` has no shape."""
    subjects = {subject: NAMES[subject] for subject in hf_decoder_of(config).needed if subject == "kv_heads"}
    return {**_NEEDED, **subjects}


def _missing_keys(config: Mapping[str, Any]) -> list[str]:
    missing = [names[0] for names in _needed(config).values() if _first(config, names) is None]
    visual = config.get("visual")
    if not isinstance(visual, dict):
        return [*missing, "visual (an object)"]
    missing += [f"visual.{key}" for key in _VISUAL_KEYS if visual.get(key) is None]
    if visual.get("adapter_heads") is None and visual.get("output_dim") is None:
        missing.append("visual.output_dim")
    return missing


def _not_numbers(config: Mapping[str, Any]) -> list[str]:
    """List the keys whose value is not a number of the kind that a shape needs."""
    visual = config["visual"]
    given = [
        (kind, name, config[name])
        for kind, names in _needed(config).items()
        for name in names
        if name in config
    ]
    given += [
        (name, f"visual.{name}", visual.get(name)) for name in (*_VISUAL_KEYS, "adapter_heads", "output_dim")
    ]
    wrong = []
    for kind, name, value in given:
        fits = is_number(value) if kind in _FRACTIONS else type(value) is int and abs(value) < _LARGEST
        if value is not None and not fits:
            wrong.append(
                f"{name}: expected a {'' if kind in _FRACTIONS else 'whole '}number, found {show_json(value)}"
            )
    return wrong


_LARGEST = 1 << 32
"""No size of a model is as large; sizes of tensors beyond it would overflow 64 bits."""


def _other_layers(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> list[str]:
    """List the numbers of layers that the tensors contradict, before a model of so many layers is described."""
    given = (
        ("num_hidden_layers", hf_decoder_of(config).layers, _first(config, NAMES["layers"])),
        ("visual.layers", "transformer.visual.transformer.resblocks.", config["visual"]["layers"]),
    )
    wrong = []
    for name, prefix, said in given:
        found = {tensor.removeprefix(prefix).split(".")[0] for tensor in specs if tensor.startswith(prefix)}
        if said > len(found):  # fewer: the tensors of the others are unknown, and named
            wrong.append(
                f"{name}: expected {len(found)}, as there are tensors of so many layers, found {said}"
            )
    return wrong


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first name that is present."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def _model_of(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> ModelConfig:
    visual = config["visual"]
    positions, queries = specs[_POSITIONS].shape[0], specs[_QUERY].shape[0]
    values, known = {name: _first(config, names) for name, names in _NEEDED.items()}, hf_decoder_of(config)
    adapter_heads = visual.get("adapter_heads")
    return ModelConfig(
        vision=VisionConfig(
            layers=visual["layers"],
            width=visual["width"],
            heads=visual["heads"],
            mlp_hidden=int(visual["width"] * visual["mlp_ratio"]),
            patch_size=visual["patch_size"],
            position_grid=math.isqrt(positions),
        ),
        adapter=AdapterConfig(
            query_grid=math.isqrt(queries),
            heads=visual["output_dim"] // _HEAD_WIDTH if adapter_heads is None else adapter_heads,
        ),
        decoder=DecoderConfig(
            family=known.family,
            query_groups=known.read_groups(config),
            layers=values["layers"],
            hidden=values["hidden"],
            heads=values["heads"],
            ffn_hidden=values["intermediate"] // known.mlp_factor,
            vocab_size=values["vocabulary"],
            rotary_base=values["rotary_base"],
            norm_eps=values["norm_eps"],
        ),
    )


def read_image_size(path: Path) -> int | None:
    """Read the image size from a Qwen-VL's `config.json` that `read_model` has accepted; None: not stated.

    Raises:
        CheckpointError: not a number of pixels.
    """
    size = read_json(path)["visual"].get("image_size")
    if size is not None and not (type(size) is int and size > 0):
        raise CheckpointError(f"{path}: visual.image_size: expected pixels, found {show_json(size)}")
    return size


_GENERATION = (
    "bos_token_id", "chat_format", "do_sample", "early_stopping", "eos_token_id", "length_penalty", "max_length",
    "max_new_tokens", "max_window_size", "min_length", "min_new_tokens", "no_repeat_ngram_size", "num_beams",
    "num_return_sequences", "pad_token_id", "repetition_penalty", "stop_words_ids", "temperature", "top_k", "top_p",
    "typical_p", "use_cache",
)  # fmt: skip
"""Keys of `generation_config.json` that an export gives back. Others are left out, as some name code that transformers
would fetch and run (`auto_map`, `custom_generate`)."""


def generation_notes(directory: Path) -> tuple[str, ...]:
    """Name the keys of a directory's `generation_config.json` that are not kept."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return ()
    left_out = sorted(read_json(path).keys() - {*_GENERATION, "transformers_version", "_from_model_config"})
    names = ", ".join(map(show_name, left_out))
    return (f"note: {path}: not kept for an export: {names}",) if left_out else ()


def read_hf_metadata(directory: Path) -> HFMetadata:
    """Read the metadata beside the weights of a Qwen, Qwen2 or Qwen-VL directory.

    Raises:
        CheckpointError: a file is not JSON, or a value is of another type.
    """
    path, generation = directory / "config.json", directory / "generation_config.json"
    config = read_json(path)
    known = hf_decoder_of(config)
    kept = {key: config[key] for key in known.kept if key in config}
    _check_plain(path, kept)
    generated = read_json(generation) if generation.is_file() else None
    if generated is not None:
        _check_plain(generation, generated)
        generated = {key: value for key, value in generated.items() if key in _GENERATION}
        chat_format = generated.get("chat_format", "raw")
        if not isinstance(chat_format, str):
            raise CheckpointError(
                f'{generation}: chat_format: expected "raw" or "chatml", found {show_json(chat_format)}'
            )
    try:
        tokenizer = tokenizer_digest(directory / known.tokenizer_file)
        found = {"config": kept, "generation": generated, "tokenizer": tokenizer}
        return HFMetadata.model_validate({**known.read_context(config), **found}, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def tokenizer_digest(path: Path) -> str | None:
    """SHA-256 of a vocabulary file; None: there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _check_plain(path: Path, content: object) -> None:
    """Refuse NaN and Infinity, which Python reads although they are not JSON and which cannot be compared, and lone
    surrogates, which cannot be written."""
    if isinstance(content, float) and not math.isfinite(content):
        raise CheckpointError(f"{path}: not JSON: holds {content}")
    if isinstance(content, str) and any("\ud800" <= letter <= "\udfff" for letter in content):
        raise CheckpointError(f"{path}: not text: {show_json(content)}")
    parts = (
        content.items() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    )
    for part in parts:
        _check_plain(path, part)


def hf_config(
    model: ModelConfig, image_size: int, dtype: str, hf_metadata: HFMetadata | None = None
) -> dict[str, Any]:
    """Make `config.json` for the decoder's family, with the ViT and the adapter in the section `visual`; `hf_metadata`
    comes from the weights' origin."""
    known = hf_decoder(model.decoder)
    vision, adapter, decoder = model.vision, model.adapter, model.decoder
    visual: dict[str, Any] = {
        "heads": vision.heads,
        "image_size": image_size,
        "image_start_id": known.image_start,
        "layers": vision.layers,
        "mlp_ratio": _mlp_ratio(vision.width, vision.mlp_hidden),
        "n_queries": adapter.query_grid**2,
        "output_dim": decoder.hidden,
        "patch_size": vision.patch_size,
        "width": vision.width,
    }
    if adapter.heads != decoder.hidden // _HEAD_WIDTH:
        visual["adapter_heads"] = adapter.heads
    return {**known.config(decoder, dtype, hf_metadata or known.new_metadata()), "visual": visual}


def hf_limits(model: ModelConfig) -> list[str]:
    """List where the model's shape is one that the published code does not compute; empty for the published shape, and
    for a family for whose whole model no code was published."""
    found: list[str] = []
    if not hf_decoder(model.decoder).code_files:
        return found
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
        ratio: float = math.ceil(hidden / width * 10**digits) / 10**digits
        if int(width * ratio) == hidden:
            return ratio
    raise CheckpointError(f"no mlp_ratio gives {hidden} from width {width}")


def generation_config(
    decoder: DecoderConfig, chat: bool, hf_metadata: HFMetadata | None = None
) -> dict[str, Any]:
    """Make `generation_config.json`: the origin's own if it is of the requested kind, else that of the family's chat
    model or of its pre-trained one."""
    if hf_metadata is not None and hf_metadata.generation is not None and hf_metadata.chats == chat:
        return {key: hf_metadata.generation[key] for key in hf_metadata.generation if key in _GENERATION}
    return hf_decoder(decoder).generation(chat)
