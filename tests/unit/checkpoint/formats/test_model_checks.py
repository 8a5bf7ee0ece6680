"""Configurations beside published weights: what would compute something else is refused, by every name it goes by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from megatron_qwenvl.checkpoint.convert.exports import execute_export, plan_export
from megatron_qwenvl.checkpoint.convert.imports import Import, execute_import, plan_parts, plan_qwenvl
from megatron_qwenvl.checkpoint.formats.model_checks import vit_problems
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.config.recipes import RECIPES

from ..hf_cases import (
    TINY,
    as_hugging_face_clip,
    config_json,
    open_clip_weights,
    random_weights,
    write_hf,
    write_parts,
)

OLD_QWEN: dict[str, Any] = {
    "activation": "swiglu", "apply_residual_connection_post_layernorm": False, "ffn_hidden_size": 96, "kv_channels": 8,
    "layernorm_epsilon": 1e-6, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 8192, "no_bias": True,
    "padded_vocab_size": 96, "pos_emb": "rotary", "rotary_emb_base": 10000, "rotary_pct": 1.0,
    "scale_attn_weights": True, "seq_length": 2048, "tie_word_embeddings": False, "use_dynamic_ntk": True,
    "use_logn_attn": True, "vocab_size": 96,
}  # fmt: skip
"""Qwen-7B's configuration as it was first published, at the small size."""

VIT = {"image_size": 56, "layers": 2, "width": 24, "head_width": 6, "mlp_ratio": 1.6667, "patch_size": 14}
CLIP = {
    "hidden_act": "gelu", "hidden_size": 24, "intermediate_size": 40, "layer_norm_eps": 1e-5, "num_attention_heads": 4,
    "num_hidden_layers": 2, "patch_size": 14, "image_size": 56, "num_channels": 3,
}  # fmt: skip


def plan(vit: Path, llm: Path) -> Import:
    recipe = RECIPES["tiny_stage1"]().model_copy(update={"model": TINY})
    return plan_parts(vit, llm, recipe, seed=1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """OpenCLIP and Qwen-7B directories; a test writes the configuration that it looks at."""
    return write_parts(tmp_path_factory.mktemp("parts"), TINY, vocab=96)


OTHER_OLD: dict[str, Any] = {
    "activation": "gelu", "apply_residual_connection_post_layernorm": True, "ffn_hidden_size": 48, "kv_channels": 16,
    "layernorm_epsilon": 1e-5, "layer_norm_epsilon": 1e-5, "rms_norm_eps": 1e-5, "n_embd": 64, "n_head": 8,
    "n_layer": 3, "num_layers": 3, "no_bias": False, "pos_emb": "learned", "rotary_emb_base": 1e6, "rope_theta": 1e6,
    "rotary_pct": 0.5, "scale_attn_weights": False, "tie_word_embeddings": True, "num_key_value_heads": 2,
    "rope_scaling": {"type": "linear", "factor": 2}, "hidden_act": "gelu_new",
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER_OLD)
def test_old_names_are_compared_too(parts: tuple[Path, Path], key: str) -> None:
    vit, llm = parts
    (llm / "config.json").write_text(json.dumps(OLD_QWEN))
    plan(vit, llm)
    (llm / "config.json").write_text(json.dumps(OLD_QWEN | {key: OTHER_OLD[key]}))
    with pytest.raises(CheckpointError, match=rf"llm/config.json: {key}: expected .*, found"):
        plan(vit, llm)


def test_everything_that_differs_is_said_at_once(parts: tuple[Path, Path], tmp_path: Path) -> None:
    _, llm = parts
    vit = tmp_path / "vit"
    vit.mkdir()
    save_file(open_clip_weights(TINY), vit / "open_clip_model.safetensors")
    wrong = {"model_cfg": {"quick_gelu": True, "vision_cfg": VIT | {"head_width": 12, "layers": 3}}}
    (vit / "open_clip_config.json").write_text(json.dumps(wrong))
    (llm / "config.json").write_text(json.dumps(OLD_QWEN | {"n_head": 8, "rotary_emb_base": 1000}))
    with pytest.raises(CheckpointError) as caught:
        plan(vit, llm)
    for key in ("quick_gelu", "vision_cfg.head_width", "vision_cfg.layers", "n_head", "rotary_emb_base"):
        assert f"{key}: expected" in str(caught.value)


def test_what_is_not_told_is_said(parts: tuple[Path, Path]) -> None:
    vit, llm = parts
    told = {k: v for k, v in OLD_QWEN.items() if k not in ("n_head", "rotary_emb_base")}
    (llm / "config.json").write_text(json.dumps(told))
    notes = [note for note in plan(vit, llm).notes if note.startswith("note")]
    assert len(notes) == 2
    assert "no configuration beside the ViT: assumed 4 heads, exact GELU" in notes[0]
    assert "does not say num_attention_heads, rotary_emb_base: assumed" in notes[1]


def compared(folder: Path, name: str, config: dict[str, Any]) -> tuple[list[str], list[str]]:
    (folder / name).write_text(json.dumps(config))
    return vit_problems(folder, TINY)


OTHER_OPEN_CLIP: dict[str, Any] = {
    "layers": 3, "width": 32, "head_width": 8, "mlp_ratio": 4.0, "patch_size": 16, "ls_init_value": 1e-4,
    "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}, "no_ln_pre": True, "input_patchnorm": True,
    "pos_embed_type": "sin_cos_2d", "timm_model_name": "vit_large", "quick_gelu": True, "qk_norm": True,
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER_OPEN_CLIP)
def test_open_clip_configurations_are_compared(tmp_path: Path, key: str) -> None:
    good = {"model_cfg": {"vision_cfg": VIT | {"pool_type": "tok", "act_kwargs": {}}, "quick_gelu": False}}
    assert compared(tmp_path, "open_clip_config.json", good)[0] == []
    wrong = {"model_cfg": {"vision_cfg": VIT | {key: OTHER_OPEN_CLIP[key]}}}
    (problem,) = compared(tmp_path, "open_clip_config.json", wrong)[0]
    assert f"open_clip_config.json: model_cfg.vision_cfg.{key}" in problem and ": expected " in problem


def test_a_quick_gelu_vit_is_refused_by_either_layout(tmp_path: Path) -> None:
    for name, config in (
        ("open_clip_config.json", {"model_cfg": {"quick_gelu": True, "vision_cfg": VIT}}),
        (
            "open_clip_config.json",
            {"quick_gelu": True, "vision_cfg": VIT},
        ),  # OpenCLIP's bare model configuration
        ("config.json", {"vision_config": CLIP | {"hidden_act": "quick_gelu"}}),
        ("config.json", {"vision_config_dict": CLIP | {"hidden_act": "quick_gelu"}}),
        ("config.json", {"model_type": "clip_vision_model", **CLIP, "hidden_act": "quick_gelu"}),
    ):
        folder = tmp_path / "one"
        folder.mkdir()
        assert len(compared(folder, name, config)[0]) == 1, config
        (folder / "weights.safetensors").write_bytes(b"")
        assert vit_problems(folder / "weights.safetensors", TINY)[0], "the file's own folder is looked at"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


OTHER_CLIP: dict[str, Any] = {
    "hidden_act": "gelu_new", "hidden_size": 32, "intermediate_size": 96, "layer_norm_eps": 1e-3,
    "num_attention_heads": 6, "num_hidden_layers": 3, "patch_size": 16, "num_channels": 1,
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER_CLIP)
def test_hugging_face_configurations_are_compared(tmp_path: Path, key: str) -> None:
    problems, notes = compared(tmp_path, "config.json", {"vision_config": CLIP})
    assert problems == []
    assert "epsilon 1e-05, here 1e-06" in notes[0]  # OpenCLIP's, from which the published Qwen-VL started
    (problem,) = compared(tmp_path, "config.json", {"vision_config": CLIP | {key: OTHER_CLIP[key]}})[0]
    assert f"config.json: vision_config.{key}: expected" in problem


def test_other_pixels_are_refused(tmp_path: Path) -> None:
    half = [0.5, 0.5, 0.5]
    config = {
        "model_cfg": {"vision_cfg": VIT},
        "preprocess_cfg": {"mean": half, "std": [0.2686, 0.2613, 0.2758]},
    }
    (problem,) = compared(tmp_path, "open_clip_config.json", config)[0]
    assert "preprocess_cfg.mean: expected" in problem
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_std": half}))
    assert "preprocessor_config.json: image_std: expected" in vit_problems(tmp_path, TINY)[0][-1]


def test_hugging_face_weights_import_with_their_configuration(
    tmp_path: Path, parts: tuple[Path, Path]
) -> None:
    save_file(as_hugging_face_clip(open_clip_weights(TINY)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": CLIP}))
    (parts[1] / "config.json").write_text(json.dumps(OLD_QWEN))
    plan(tmp_path, parts[1])


OTHER_QWENVL: list[tuple[str, str, Any]] = [
    ("", "scale_attn_weights", False), ("", "rotary_pct", 0.25), ("", "tie_word_embeddings", True),
    ("", "rope_scaling", {"type": "dynamic"}), ("", "n_head", 8), ("", "layernorm_epsilon", 1e-5),
    ("", "rope_theta", 500), ("visual", "output_dim", 64), ("visual", "n_queries", 9),
    ("visual", "image_start_id", 5), ("visual", "hidden_act", "quick_gelu"), ("visual", "quick_gelu", True),
    ("visual", "layer_norm_eps", 1e-5), ("visual", "heads", 5),
]  # fmt: skip


@pytest.mark.parametrize(("section", "key", "value"), OTHER_QWENVL, ids=str)
def test_a_qwenvl_that_computes_something_else_is_refused(
    tmp_path: Path, section: str, key: str, value: Any
) -> None:
    hf = write_hf(tmp_path / "p", TINY, random_weights(TINY))
    config: dict[str, Any] = config_json(TINY, 448)
    (config[section] if section else config)[key] = value
    (hf / "config.json").write_text(json.dumps(config))
    place = f"{section}.{key}" if section else key
    with pytest.raises(CheckpointError, match=rf"p/config.json: {place}: expected .*, found"):
        plan_qwenvl(hf)


def test_a_qwenvl_by_old_names_is_the_same(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "p", TINY, random_weights(TINY))
    expected = plan_qwenvl(hf).manifest.model
    old = {
        **OLD_QWEN,
        "visual": config_json(TINY, 448)["visual"],
        "vocab_size": 90,
    }  # rows are padded_vocab_size
    (hf / "config.json").write_text(json.dumps(old))
    assert plan_qwenvl(hf).manifest.model == expected


def test_missing_keys_are_named_together(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "p", TINY, random_weights(TINY))
    config: dict[str, Any] = config_json(TINY, 448)
    del config["num_attention_heads"], config["rotary_emb_base"], config["visual"]["heads"]
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing num_attention_heads, rotary_emb_base, visual.heads$"):
        plan_qwenvl(hf)


def test_an_export_writes_the_true_values(tmp_path: Path) -> None:
    """Another base, epsilon and trained length come back as they were."""
    hf = write_hf(tmp_path / "p", TINY, random_weights(TINY))
    true = {"rotary_emb_base": 50000, "layer_norm_epsilon": 1e-5, "seq_length": 512, "use_dynamic_ntk": False,
            "use_logn_attn": False, "max_position_embeddings": 1024, "use_flash_attn": False}  # fmt: skip
    foreign = {"auto_map": {"AutoConfig": "someone/else--code.Config"}, "_name_or_path": "/home/someone"}
    (hf / "config.json").write_text(json.dumps(config_json(TINY, 448) | true | foreign))
    execute_import(plan_qwenvl(hf), tmp_path / "megatron")
    execute_export(plan_export(tmp_path / "megatron"), tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config.items() >= true.items()
    assert "someone" not in json.dumps(config)
