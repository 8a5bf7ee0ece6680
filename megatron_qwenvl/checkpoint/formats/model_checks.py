"""Comparison of published configurations with the model that is to hold their weights.

Shapes of tensors do not show the number of heads, activations, epsilons of norms or the rotary base. They stand in a
configuration beside the weights, under names that have changed over the years; every name that is present is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_qwenvl.architecture.vit import describe_vit
from megatron_qwenvl.config.schema import ModelConfig
from megatron_qwenvl.model.pixels import CLIP_MEAN, CLIP_STD

from .config_comparison import Compared, Expected, compare_section, is_number, is_same, named_classes, one_of
from .config_keys import SUBJECTS
from .hf_families import HF_DECODERS, hf_decoder
from .hf_files import read_json

OPEN_CLIP_EPS = 1e-5
"""Epsilon of OpenCLIP's norms, torch's default. The published Qwen-VL took over OpenCLIP's weights and has 1e-6."""

_OPEN_CLIP_DEFAULTS = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16}
"""OpenCLIP's `CLIPVisionCfg` without arguments."""

_CLIP_DEFAULTS = {
    "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    "patch_size": 32, "hidden_act": "quick_gelu",
}  # fmt: skip
"""transformers' `CLIPVisionConfig` without arguments; what equals them is not written when a model is saved."""


def _vision_table(model: ModelConfig, *eps: float) -> dict[str, Expected]:
    vit, patch = describe_vit(model.vision), model.vision.patch_size
    ratio = Expected(
        f"{vit.ffn_hidden} / {vit.hidden}",
        lambda found: is_number(found) and int(vit.hidden * found) == vit.ffn_hidden,  # type: ignore[operator]
    )
    return {
        "architectures": named_classes("CLIP"),
        "model_type": one_of("clip", "clip_vision_model"),
        "layers": one_of(vit.layers),
        "width": one_of(vit.hidden),
        "heads": one_of(vit.heads),
        "head_width": one_of(vit.head_size),
        "kv_heads": one_of(vit.query_groups),
        "mlp": one_of(vit.ffn_hidden),
        "mlp_ratio": ratio,
        "patch": one_of(patch, [patch] * 2),
        "channels": one_of(3),
        "norm": one_of("layernorm", "layer_norm", "LayerNorm", "nn.LayerNorm"),
        "norm_eps": one_of(*eps),
        "activation": one_of("gelu", "gelu_python", "GELU", "nn.GELU"),
        "approximate": one_of("none"),
        "quick_gelu": one_of(False),
        "positions": one_of("learnable", "learned", "absolute"),
        "bias": one_of(vit.bias),
        "qkv_bias": one_of(vit.qkv_bias),
        "scaled_scores": one_of(True),
        "no_ln_pre": one_of(False),
        "mean": _near(CLIP_MEAN),
        "deviation": _near(CLIP_STD),
        "tied": Expected("anything", lambda found: True),
    }


def _near(values: tuple[float, ...]) -> Expected:
    """Expect colours that are written with three digits or more."""

    def fits(found: object) -> bool:
        return (
            isinstance(found, list)
            and len(found) == len(values)
            and all(
                is_number(a) and math.isclose(a, b, abs_tol=1e-3) for a, b in zip(found, values, strict=True)
            )
        )

    return Expected(str(list(values)), fits)


def compare_visual(path: Path, config: Mapping[str, Any], model: ModelConfig) -> Compared:
    """Compare the `visual` section of a Qwen-VL configuration with the model that its other keys gave."""
    expected = {
        "output_dim": model.decoder.hidden,
        "n_queries": model.adapter.query_grid**2,
        "image_start_id": hf_decoder(model.decoder).image_start,
    }
    apart = frozenset({*expected, "adapter_heads", "image_size"})
    found = compare_section(path, "visual.", config, _vision_table(model, model.vision.norm_eps), apart=apart)
    for name, value in expected.items():
        if config.get(name) is not None and not is_same(config[name], value):
            found.differs(path, f"visual.{name}", str(value), config[name])
    if model.vision.width % model.vision.heads:
        found.differs(path, "visual.heads", f"a divisor of {model.vision.width}", model.vision.heads)
    if model.decoder.hidden % model.adapter.heads:
        found.differs(
            path, "visual.adapter_heads", f"a divisor of {model.decoder.hidden}", model.adapter.heads
        )
    return found


def vit_problems(weights: Path, model: ModelConfig) -> tuple[list[str], list[str]]:
    """Compare the configurations beside CLIP's weights, OpenCLIP's or Hugging Face's, with the ViT.

    Args:
        weights: file or directory of the weights.
        model: the model that is to use them.

    Returns:
        Differences, and notes of what is assumed.
    """
    folder = weights if weights.is_dir() else weights.parent
    found = Compared()
    known = False
    for name in ("open_clip_config.json", "config.json"):
        path = folder / name
        config = read_json(path) if path.is_file() else {}
        if (name.startswith("open") and path.is_file()) or config.keys() & {"model_cfg", "vision_cfg"}:
            known = True
            found.add(_compare_open_clip(path, config, model))
        elif _is_clip(config):
            known = True
            found.add(_compare_clip(path, config, model))
        elif config:
            found.notes.append(f"note: {path}: not the configuration of a ViT, not regarded")
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        found.add(_compare_pixels(processor, "", read_json(processor), model))
    if not known:
        found.notes.append(
            f"note: no configuration beside the ViT: assumed {model.vision.heads} heads, exact GELU and norms "
            f"as in OpenCLIP (epsilon {OPEN_CLIP_EPS:g}, here {model.vision.norm_eps:g})"
        )
    elif not is_same(found.given.get("norm_eps", OPEN_CLIP_EPS), model.vision.norm_eps):
        found.notes.append(
            f"note: the ViT's norms have epsilon {OPEN_CLIP_EPS:g}, here {model.vision.norm_eps:g}: as the published "
            "Qwen-VL, which started from OpenCLIP's weights too"
        )
    return found.problems, found.notes


def _compare_open_clip(path: Path, config: Mapping[str, Any], model: ModelConfig) -> Compared:
    """Compare a file of OpenCLIP: the model stands below `model_cfg` or, as in OpenCLIP's source, at the top. Keys
    outside of the ViT's own section are compared, too."""
    table = _vision_table(model, model.vision.norm_eps, OPEN_CLIP_EPS)
    outside = frozenset({"model_cfg", "vision_cfg", "preprocess_cfg", "embed_dim"})
    found = compare_section(path, "", config, table, apart=outside)
    lead, inner = ("model_cfg.", config["model_cfg"]) if "model_cfg" in config else ("", config)
    if lead:
        found.add(compare_section(path, lead, inner, table, apart=outside))
    visual = inner.get("vision_cfg") if isinstance(inner, Mapping) else None
    found.add(compare_section(path, f"{lead}vision_cfg.", visual, table, _OPEN_CLIP_DEFAULTS))
    found.add(_compare_pixels(path, "preprocess_cfg.", config.get("preprocess_cfg", {}), model))
    return found


def _is_clip(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` describes a ViT: it is of transformers' CLIP, or has any key of a model. That of a Qwen,
    which may lie beside a single weights file, does not."""
    sections = {"vision_config", "vision_config_dict"}
    decoders = {known.model_type for known in HF_DECODERS.values()}
    return config.get("model_type") not in decoders and bool(config.keys() & (sections | SUBJECTS.keys()))


def _compare_clip(path: Path, config: Mapping[str, Any], model: ModelConfig) -> Compared:
    """Compare a file of transformers: the section of a ViT (the old name wins, as there), or a ViT alone."""
    table = _vision_table(model, model.vision.norm_eps, OPEN_CLIP_EPS)
    sections = [name for name in ("vision_config_dict", "vision_config") if config.get(name) is not None]
    defaults = None if sections else _CLIP_DEFAULTS
    found = compare_section(path, "", config, table, defaults, apart=frozenset(sections))
    for name in sections:
        defaults = _CLIP_DEFAULTS if name == sections[0] else None
        found.add(compare_section(path, f"{name}.", config[name], table, defaults))
    return found


def _compare_pixels(path: Path, prefix: str, section: object, model: ModelConfig) -> Compared:
    if isinstance(section, Mapping):
        section = {
            name: value for name, value in section.items() if SUBJECTS.get(name) in ("mean", "deviation")
        }
    return compare_section(path, prefix, section, _vision_table(model))
