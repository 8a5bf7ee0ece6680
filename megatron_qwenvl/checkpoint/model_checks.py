"""Published configurations against the model that is to hold their weights.

Shapes of tensors do not show the number of heads, activations, epsilons of norms or the rotary base. These stand in a
configuration beside the weights, under names that have changed over the years; every name that is there is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_qwenvl.config.schema import DecoderConfig, ModelConfig
from megatron_qwenvl.model.pixels import CLIP_MEAN, CLIP_STD

from .published import read_json

OPEN_CLIP_EPS = 1e-5
"""Epsilon of OpenCLIP's norms, torch's default. The published Qwen-VL took over OpenCLIP's weights and has 1e-6."""

IMAGE_START = 151857
"""Id of `<img>` in the published vocabulary."""

DECODER_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "intermediate": ("intermediate_size", "ffn_hidden_size"),
    "norm_eps": ("layer_norm_epsilon", "layernorm_epsilon", "rms_norm_eps"),
    "rotary_base": ("rotary_emb_base", "rope_theta", "rotary_base"),
}
"""The names, new and old, of what a Qwen configuration says."""

_GELU = ("gelu", "gelu_python")
"""Names of the exact GELU."""

_REST_OF_OPEN_CLIP = {
    "image_size", "patch_dropout", "attentional_pool", "attn_pooler_queries", "attn_pooler_heads", "pool_type",
    "final_ln_after_pool", "output_tokens",
}  # fmt: skip
"""Keys about what is not imported, or what the shapes show."""


class Comparison:
    """Collects in what a configuration differs from what is expected, and what it does not say.

    Args:
        path: the file.
        config: the object in it that is looked at.
        prefix: the keys that lead to it, with a dot at the end.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], prefix: str = "") -> None:
        self._path, self._config, self._prefix = path, config, prefix
        self.problems: list[str] = []
        """Differences, each with file, key, expected and found."""
        self.silent: list[str] = []
        """Keys that are needed and not there."""
        self.seen: set[str] = set()
        """Keys that were asked for."""

    def expect(self, names: str | tuple[str, ...], *expected: Any, needed: bool = False) -> None:
        """Whatever of `names` is there must be one of `expected`."""
        names = (names,) if isinstance(names, str) else names
        self.seen.update(names)
        given = {name: self._config[name] for name in names if self._config.get(name) is not None}
        for name, found in given.items():
            if not any(_same(found, value) for value in expected):
                self.differs(name, " or ".join(map(str, expected)) or "nothing", found)
        if needed and not given:
            self.silent.append(f"{self._prefix}{names[0]}")

    def differs(self, name: str, expected: object, found: object) -> None:
        """Note that a key is not what it must be."""
        self.problems.append(f"{self._path}: {self._prefix}{name}: expected {expected}, found {found}")


def _same(found: object, expected: object) -> bool:
    """Whether two JSON values are the same; numbers to the precision of a float32 that was written down."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, int | float) and isinstance(expected, int | float):
        return math.isclose(found, expected, rel_tol=1e-6)
    return found == expected


def decoder_problems(
    path: Path, config: Mapping[str, Any], decoder: DecoderConfig
) -> tuple[list[str], list[str]]:
    """Compare a Qwen configuration, of any age, with a decoder.

    Args:
        path: its file.
        config: its content.
        decoder: what the weights are to be used in.

    Returns:
        Differences, and keys that tensors' shapes do not show and that are not there.
    """
    found = Comparison(path, config)
    found.expect(DECODER_NAMES["layers"], decoder.layers)
    found.expect(DECODER_NAMES["hidden"], decoder.hidden)
    found.expect(DECODER_NAMES["heads"], decoder.heads, needed=True)
    found.expect(DECODER_NAMES["intermediate"], 2 * decoder.ffn_hidden)
    found.expect(DECODER_NAMES["norm_eps"], decoder.norm_eps, needed=True)
    found.expect(DECODER_NAMES["rotary_base"], decoder.rotary_base, needed=True)
    found.expect(("kv_channels", "head_dim"), decoder.hidden // decoder.heads)
    found.expect(("num_key_value_heads", "num_query_groups", "multi_query_group_num"), decoder.heads)
    found.expect(("rotary_pct", "rotary_percent", "partial_rotary_factor"), 1.0)
    found.expect(("pos_emb", "position_embedding_type"), "rotary", "rope")
    found.expect(("activation", "hidden_act"), "swiglu", "silu")
    found.expect("rope_scaling")
    found.expect("no_bias", True)
    found.expect("tie_word_embeddings", False)
    found.expect("scale_attn_weights", True)
    found.expect("apply_residual_connection_post_layernorm", False)
    return found.problems, found.silent


def visual_problems(path: Path, config: Mapping[str, Any], model: ModelConfig) -> tuple[list[str], list[str]]:
    """Compare the `visual` section of a Qwen-VL configuration with the model that its other keys gave.

    Returns:
        Differences, and keys that nothing is known about.
    """
    vision = model.vision
    found = Comparison(path, config, "visual.")
    found.expect("output_dim", model.decoder.hidden)
    found.expect("n_queries", model.adapter.query_grid**2)
    found.expect("image_start_id", IMAGE_START)
    found.expect(("hidden_act", "act_layer", "activation", "activation_function"), *_GELU)
    found.expect("quick_gelu", False)
    found.expect(
        ("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps", "eps"), vision.norm_eps
    )
    found.expect(("in_channels", "num_channels"), 3)
    if vision.width % vision.heads:
        found.differs("heads", f"a divisor of {vision.width}", vision.heads)
    known = {"width", "layers", "heads", "mlp_ratio", "patch_size", "adapter_heads", "image_size"}
    return found.problems, sorted(config.keys() - found.seen - known)


def vit_problems(weights: Path, model: ModelConfig) -> tuple[list[str], list[str]]:
    """Compare the configurations beside CLIP's weights, OpenCLIP's or Hugging Face's, with the ViT.

    Args:
        weights: file or directory of the weights.
        model: what they are to be used in.

    Returns:
        Differences, and notes of what is assumed.
    """
    folder = weights if weights.is_dir() else weights.parent
    problems: list[str] = []
    notes: list[str] = []
    known = False
    for name, compare in (("open_clip_config.json", _open_clip), ("config.json", _hugging_face)):
        path = folder / name
        compared = compare(path, read_json(path), model) if path.is_file() else None
        if compared is not None:
            known = True
            problems += compared[0]
            notes += [note for note in compared[1] if note not in notes]
    processor = folder / "preprocessor_config.json"
    if known and processor.is_file():
        problems += _pixel_problems(processor, read_json(processor), "", ("image_mean", "image_std"))
    if not known:
        notes = [
            f"note: no configuration beside the ViT: assumed {model.vision.heads} heads, exact GELU and norms "
            f"as in OpenCLIP (epsilon {OPEN_CLIP_EPS:g}, here {model.vision.norm_eps:g})"
        ]
    return problems, notes


_Compared = tuple[list[str], list[str]]


def _open_clip(path: Path, config: Mapping[str, Any], model: ModelConfig) -> _Compared | None:
    outer = config.get("model_cfg", config)
    visual = outer.get("vision_cfg") if isinstance(outer, dict) else None
    if not isinstance(visual, dict):
        return None
    vision = model.vision
    lead = "model_cfg." if outer is not config else ""
    whole = Comparison(path, outer, lead)
    whole.expect("quick_gelu", False)
    found = Comparison(path, visual, f"{lead}vision_cfg.")
    found.expect("layers", vision.layers)
    found.expect("width", vision.width)
    found.expect("head_width", vision.width // vision.heads, needed=True)
    found.expect("patch_size", vision.patch_size)
    found.expect("quick_gelu", False)
    found.expect("pos_embed_type", "learnable")
    for absent in ("ls_init_value", "timm_model_name", "block_type"):
        found.expect(absent)
    for off in ("no_ln_pre", "input_patchnorm", "qk_norm", "scaled_cosine_attn", "scale_heads"):
        found.expect(off, False)
    ratio = visual.get("mlp_ratio")
    if ratio is not None and not (_number(ratio) and int(vision.width * ratio) == vision.mlp_hidden):
        found.differs("mlp_ratio", f"{vision.mlp_hidden} / {vision.width}", ratio)
    for name in ("act_kwargs", "norm_kwargs"):
        if not isinstance(visual.get(name) or {}, dict):
            found.differs(name, "an object", visual[name])
            return whole.problems + found.problems, []
    activation = Comparison(path, visual.get("act_kwargs") or {}, f"{lead}vision_cfg.act_kwargs.")
    activation.expect("approximate", "none")
    norms = visual.get("norm_kwargs") or {}
    norm = Comparison(path, norms, f"{lead}vision_cfg.norm_kwargs.")
    norm.expect("eps", vision.norm_eps, OPEN_CLIP_EPS)
    strange = visual.keys() - found.seen - {"mlp_ratio", "act_kwargs", "norm_kwargs"} - _REST_OF_OPEN_CLIP
    problems = whole.problems + found.problems + activation.problems + norm.problems
    preprocess = config.get("preprocess_cfg")
    if isinstance(preprocess, dict):
        problems += _pixel_problems(path, preprocess, "preprocess_cfg.", ("mean", "std"))
    notes = [
        f"note: {path}: {lead}vision_cfg.{name} is not known and not regarded" for name in sorted(strange)
    ]
    return problems, [
        *notes,
        *_assumed(path, found.silent),
        *_eps_note(norms.get("eps", OPEN_CLIP_EPS), model),
    ]


def _hugging_face(path: Path, config: Mapping[str, Any], model: ModelConfig) -> _Compared | None:
    section = next((key for key in ("vision_config", "vision_config_dict") if key in config), None)
    visual = config[section] if section else config
    if not isinstance(visual, dict) or not (section or config.get("model_type") == "clip_vision_model"):
        return None
    vision = model.vision
    found = Comparison(path, visual, f"{section}." if section else "")
    found.expect(("num_hidden_layers", "num_layers", "n_layer"), vision.layers)
    found.expect(("hidden_size", "width"), vision.width)
    found.expect(("num_attention_heads", "num_heads", "n_head"), vision.heads, needed=True)
    found.expect("intermediate_size", vision.mlp_hidden)
    found.expect("patch_size", vision.patch_size)
    found.expect("num_channels", 3)
    found.expect(("hidden_act", "activation_function"), *_GELU, needed=True)
    found.expect("quick_gelu", False)
    eps = ("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon")
    found.expect(eps, vision.norm_eps, OPEN_CLIP_EPS)
    given = next((visual[name] for name in eps if visual.get(name) is not None), OPEN_CLIP_EPS)
    return found.problems, [*_assumed(path, found.silent), *_eps_note(given, model)]


def _pixel_problems(path: Path, config: Mapping[str, Any], prefix: str, names: tuple[str, str]) -> list[str]:
    found = Comparison(path, config, prefix)
    for name, expected in zip(names, (CLIP_MEAN, CLIP_STD), strict=True):
        value = config.get(name)
        if value is None:
            continue
        fits = isinstance(value, list) and len(value) == 3 and all(map(_number, value))
        if not fits or any(
            not math.isclose(a, b, abs_tol=1e-3) for a, b in zip(value, expected, strict=True)
        ):
            found.differs(name, list(expected), value)
    return found.problems


def _eps_note(eps: object, model: ModelConfig) -> list[str]:
    if _same(eps, model.vision.norm_eps):
        return []
    return [
        f"note: the ViT's norms have epsilon {OPEN_CLIP_EPS:g}, here {model.vision.norm_eps:g}: as the published "
        "Qwen-VL, which started from OpenCLIP's weights too"
    ]


def _assumed(path: Path, silent: list[str]) -> list[str]:
    return [f"note: {path} does not say {', '.join(silent)}: assumed as in the model"] if silent else []


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
