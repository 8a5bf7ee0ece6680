"""Keys of published configurations: every name in every section, defaults of absent ones, types, unknown ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_qwenvl.checkpoint.convert.imports import plan_qwenvl
from megatron_qwenvl.checkpoint.formats.config_keys import NAMES
from megatron_qwenvl.checkpoint.formats.model_checks import vit_problems
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError

from ..hf_cases import TINY, config_json, random_weights, write_hf
from .test_model_checks import CLIP, OLD_QWEN, VIT, compared

SECTIONS: dict[str, tuple[str, ...]] = {
    "": (), "visual": ("visual",), "OpenCLIP": ("model_cfg", "vision_cfg"), "OpenCLIP model": ("model_cfg",),
    "OpenCLIP file": (), "CLIP": ("vision_config",), "CLIP file": (), "old CLIP": ("vision_config_dict",),
}  # fmt: skip
"""Where a key can stand, and the keys that lead there."""


def refused(folder: Path, section: str, more: dict[str, Any]) -> list[str]:
    """The problems, without the file's path, of a good configuration with `more` in a section."""
    visual = config_json(TINY, 448)["visual"]
    whole: dict[str, Any] = {
        "visual": OLD_QWEN | {"visual": visual},
        "OpenCLIP": {"model_cfg": {"vision_cfg": VIT}},
        "CLIP": {"vision_config": CLIP},
        "old CLIP": {"vision_config_dict": CLIP, "vision_config": CLIP},
    }
    kind = next((kind for kind in ("old CLIP", "OpenCLIP", "CLIP") if section.startswith(kind)), "visual")
    config = place = json.loads(json.dumps(whole[kind]))
    for key in SECTIONS[section]:
        place = place[key]
    place.update(more)
    file = folder / ("open_clip_config.json" if kind == "OpenCLIP" else "config.json")
    for old in ("open_clip_config.json", "config.json"):
        (folder / old).unlink(missing_ok=True)
    file.write_text(json.dumps(config))
    if kind != "visual":
        return [problem.removeprefix(f"{file}: ") for problem in vit_problems(folder, TINY)[0]]
    try:
        plan_qwenvl(folder)
    except CheckpointError as error:
        return str(error).replace(f"{file}: ", "").split("; ")
    return []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("place") / "p", TINY, random_weights(TINY))


NOWHERE = {"tied"}  # a ViT has no embedding of words
OUTSIDE = {"embed_dim"}  # beside OpenCLIP's section, the width of what it shares with the text


@pytest.mark.parametrize("section", SECTIONS)
def test_every_name_is_known_in_every_section(place: Path, section: str) -> None:
    """A wrong value is refused under each name that any kind of configuration has for it."""
    assert refused(place, section, {}) == []
    lead = "".join(f"{key}." for key in SECTIONS[section])
    for subject, names in NAMES.items():
        if subject in NOWHERE and section:
            continue
        for name in names:
            if name in OUTSIDE and section.startswith("OpenCLIP "):
                continue
            problems = refused(place, section, {name: "another"})
            assert any(problem.startswith(f"{lead}{name}: expected ") for problem in problems), name
            assert all('found "another"' in problem for problem in problems), problems


COMPUTING: dict[str, Any] = {
    "use_alibi": True, "sliding_window": 128, "use_sliding_window": True, "attn_logit_softcapping": 50.0,
    "logit_scale": 2.0, "embedding_multiplier": 2.0, "query_pre_attn_scalar": 3, "quantization_config": {"bits": 4},
    "parallel_attn": True, "rope_interleaved": True, "gelu": "quick", "use_qk_norm": True, "num_experts": 4,
    "text_heads": 5, "rope_parameters": {"rope_theta": 1e6}, "act_kwargs": {"approximate": "tanh"},
    "norm_kwargs": {"eps": 0.01}, "lora_bias": True,
}  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_a_key_that_changes_the_computation_is_refused_by_its_look(place: Path, section: str) -> None:
    for key, value in COMPUTING.items():
        (problem,) = refused(place, section, {key: value})
        assert f"{key}" in problem and ": expected " in problem
        assert refused(place, section, {key: None if isinstance(value, dict) else False}) == [], key


def test_nested_objects_are_looked_into(place: Path) -> None:
    """The names of transformers 5 included; a key of such an object belongs to the computation in any case."""
    assert refused(place, "", {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}) == []
    for nested in (
        {"rope_theta": 5.0},
        {"rope_type": "yarn"},
        {"factor": 4.0},
        {"partial_rotary_factor": 0.5},
    ):
        (problem,) = refused(place, "", {"rope_parameters": nested})
        assert problem.startswith(f"rope_parameters.{next(iter(nested))}: expected ")
    assert refused(place, "CLIP", {"act_kwargs": []})[0].startswith(
        "vision_config.act_kwargs: expected an object"
    )


def test_unknown_keys_are_named(place: Path) -> None:
    strange: dict[str, Any] = {"weather": "fine", "line\nbreak": 1, "use_alibi": False, "_name_or_path": "x"}
    config = OLD_QWEN | strange | {"visual": {**CLIP_LIKE, **strange}}
    (place / "config.json").write_text(json.dumps(config))
    notes = [note.split("config.json: ")[1] for note in plan_qwenvl(place).notes if "not regarded" in note]
    names = ["weather", '"line\\nbreak"', "use_alibi"]
    assert notes == [
        f"{lead}{name} is not known and not regarded" for lead in ("", "visual.") for name in names
    ]


CLIP_LIKE: dict[str, Any] = dict(config_json(TINY, 448)["visual"])  # type: ignore[call-overload]

DEFAULTS = {"hidden_act": "quick_gelu", "num_attention_heads": 12, "num_hidden_layers": 12, "hidden_size": 768,
            "intermediate_size": 3072, "patch_size": 32}  # fmt: skip


@pytest.mark.parametrize("key", DEFAULTS)
def test_an_absent_key_means_the_default_of_its_class(tmp_path: Path, key: str) -> None:
    """transformers leaves out what equals the default, so that OpenAI's CLIP, saved again, has no `hidden_act`."""
    without = {name: value for name, value in CLIP.items() if name != key}
    for config in ({"vision_config": without}, {"model_type": "clip", "vision_config": {**without, key: None}}, without,
                   {"vision_config_dict": without, "vision_config": CLIP}):  # fmt: skip
        (problem,) = compared(tmp_path, "config.json", config)[0]
        assert f"{key}: expected " in problem
        assert problem.endswith(f"found nothing, which means {json.dumps(DEFAULTS[key])}")


@pytest.mark.parametrize(
    ("key", "default"),
    {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16}.items(),
)
def test_an_absent_key_means_open_clip_s_default(tmp_path: Path, key: str, default: float) -> None:
    config = {"model_cfg": {"vision_cfg": {name: value for name, value in VIT.items() if name != key}}}
    (problem,) = compared(tmp_path, "open_clip_config.json", config)[0]
    assert f"model_cfg.vision_cfg.{key}: expected " in problem
    assert problem.endswith(f"found nothing, which means {default}")


def test_the_defaults_are_those_of_transformers() -> None:
    from transformers import CLIPVisionConfig

    assert {key: getattr(CLIPVisionConfig(), key) for key in DEFAULTS} == DEFAULTS


def test_a_configuration_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name, config, message in (
        ("open_clip_config.json", {"model_cfg": {"vision_cfg": []}}, "model_cfg.vision_cfg: expected an object"),
        ("open_clip_config.json", {"model_cfg": 5}, "model_cfg: expected an object, found 5"),
        ("open_clip_config.json", {}, "vision_cfg: expected an object, found null"),
        ("open_clip_config.json", {"vision_cfg": VIT, "preprocess_cfg": 5}, "preprocess_cfg: expected an object"),
        ("config.json", {"vision_cfg": VIT | {"head_width": 5}}, "vision_cfg.head_width: expected 6"),
        ("config.json", {"vision_config": []}, "vision_config: expected an object"),
        ("config.json", {"model_type": "siglip", "vision_config": CLIP}, 'model_type: expected "clip" or'),
    ):  # fmt: skip
        problems = compared(tmp_path, name, config)[0]
        assert any(message in problem for problem in problems), (config, problems)
        (tmp_path / name).unlink()


def test_a_configuration_that_is_not_the_vit_s_is_not_regarded(tmp_path: Path) -> None:
    for config in (OLD_QWEN | {"model_type": "qwen"}, {"weather": "fine"}):
        problems, notes = compared(tmp_path, "config.json", config)
        assert not problems
        assert "config.json: not the configuration of a ViT, not regarded" in notes[0]
        assert "no configuration beside the ViT" in notes[1]


WRONG_SHAPES: list[tuple[str, str, Any, str]] = [
    ("", "num_attention_heads", "4", 'expected a whole number, found "4"'),
    ("", "num_hidden_layers", True, "expected a whole number, found true"),
    ("", "num_hidden_layers", 10**9, "expected 2, as there are tensors of so many layers, found 1000000000"),
    ("", "hidden_size", 32.0, "expected a whole number, found 32.0"),
    ("", "hidden_size", 1 << 70, "expected a whole number, found 1180591620717411303424"),
    ("", "layer_norm_epsilon", "1e-6", 'expected a number, found "1e-6"'),
    ("", "rotary_emb_base", float("inf"), "expected a number, found Infinity"),
    ("", "vocab_size", [96], "expected a whole number, found [96]"),
    ("", "num_attention_heads", 5, "expected a divisor of 32, found 5"),
    ("visual", "mlp_ratio", "3", 'expected a number, found "3"'),
    ("visual", "mlp_ratio", float("nan"), "expected a number, found NaN"),
    ("visual", "width", {}, "expected a whole number, found {}"),
    ("visual", "layers", 3, "expected 2, as there are tensors of so many layers, found 3"),
    ("visual", "adapter_heads", 3, "expected a divisor of 32, found 3"),
    ("visual", "output_dim", "32", 'expected a whole number, found "32"'),
]  # fmt: skip


@pytest.mark.parametrize(("section", "key", "value", "message"), WRONG_SHAPES, ids=str)
def test_a_shape_of_another_type_is_named(
    place: Path, section: str, key: str, value: Any, message: str
) -> None:
    config: dict[str, Any] = config_json(TINY, 448)
    del config["kv_channels"]
    (config[section] if section else config)[key] = value
    (place / "config.json").write_text(json.dumps(config))
    lead = f"{section}." if section else ""
    with pytest.raises(CheckpointError) as caught:
        plan_qwenvl(place)
    assert f"config.json: {lead}{key}: {message}" in str(caught.value)


def test_old_files_repeat_settings_that_change_nothing(tmp_path: Path) -> None:
    """As in files of transformers 4: every default of the base class, in the ViT's section too."""
    from transformers import CLIPVisionConfig

    more = {
        "top_k": 50,
        "torchscript": False,
        "num_beams": 1,
        "use_bfloat16": False,
        "tie_word_embeddings": True,
    }
    config = {
        "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 8, "text_config": {},
        "logit_scale_init_value": 2.6592, "initializer_factor": 1.0, "torch_dtype": "float32",
    }  # fmt: skip
    problems, notes = compared(
        tmp_path, "config.json", {**config, "vision_config": CLIPVisionConfig(**CLIP).to_dict() | more}
    )
    assert problems == [] and len(notes) == 1
