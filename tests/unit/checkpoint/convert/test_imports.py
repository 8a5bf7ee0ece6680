"""Published weights that are almost right: each is refused with its place, or read as their index says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights
from megatron_qwenvl.checkpoint.convert.imports import Import, execute_import, plan_parts, plan_qwenvl
from megatron_qwenvl.checkpoint.convert.inspect import verify
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.config.schema import ModelConfig
from megatron_qwenvl.model.positions import sincos_table

from ..hf_cases import (
    MIDDLE,
    TINY,
    as_hugging_face_clip,
    config_json,
    language_weights,
    open_clip_weights,
    random_weights,
    write_hf,
    write_parts,
    write_shards,
)

TABLE = "transformer.visual.attn_pool.pos_embed"


def plan(vit: Path, llm: Path) -> Import:
    recipe = RECIPES["tiny_stage1"]().model_copy(update={"model": TINY})
    return plan_parts(vit, llm, recipe, seed=1)


OTHER_DECODERS: dict[str, Any] = {
    "num_hidden_layers": 3,
    "rotary_emb_base": 1_000_000,
    "layer_norm_epsilon": 1e-5,
    "kv_channels": 16,
    "hidden_size": 64,
    "intermediate_size": 48,
    "no_bias": False,
    "num_attention_heads": 8,
}


@pytest.mark.parametrize("key", OTHER_DECODERS)
def test_a_language_model_that_computes_something_else_is_refused(tmp_path: Path, key: str) -> None:
    vit, llm = write_parts(tmp_path, TINY, vocab=96)
    plan(vit, llm)
    (llm / "config.json").write_text(json.dumps(config_json(TINY, 448) | {key: OTHER_DECODERS[key]}))
    with pytest.raises(CheckpointError, match=rf"llm/config.json: {key}: expected .*, found"):
        plan(vit, llm)


@pytest.mark.parametrize(
    "key", ["kv_channels", "no_bias"]
)  # the others of a Qwen-VL give the model its shape, which the tensors must have
def test_a_qwenvl_that_computes_something_else_is_refused(tmp_path: Path, key: str) -> None:
    hf = write_hf(tmp_path / "p", TINY, random_weights(TINY))
    (hf / "config.json").write_text(json.dumps(config_json(TINY, 448) | {key: OTHER_DECODERS[key]}))
    with pytest.raises(CheckpointError, match=rf"p/config.json: {key}: expected .*, found"):
        plan_qwenvl(hf)


def deeper(part: str) -> ModelConfig:
    layers = getattr(TINY, part).layers + 1
    return TINY.model_copy(update={part: getattr(TINY, part).model_copy(update={"layers": layers})})


def test_layers_beyond_the_model_are_refused(tmp_path: Path) -> None:
    """Taking the first layers of a deeper model would give a checkpoint that verifies and computes nonsense."""
    vit, llm = write_parts(tmp_path, TINY, vocab=96)
    save_file(language_weights(deeper("decoder"), 96), llm / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"llm: \d+ unknown tensors, the first: transformer.h.2"):
        plan(vit, llm)
    save_file(language_weights(TINY, 96), llm / "model.safetensors")
    weights = open_clip_weights(deeper("vision"))
    for case, tensors, first in (
        ("open_clip", weights, "visual.transformer.resblocks.2"),
        ("hugging_face", as_hugging_face_clip(weights), "vision_model.encoder.layers.2"),
    ):
        (tmp_path / case).mkdir()
        torch.save(tensors, tmp_path / case / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=rf"{case}: 12 unknown|{case}: 16 unknown") as caught:
            plan(tmp_path / case, llm)
        assert first in str(caught.value)


def test_errors_name_the_directory_that_they_are_in(tmp_path: Path) -> None:
    vit, llm = write_parts(tmp_path, TINY, vocab=96)
    language = language_weights(TINY, 96)
    name = "transformer.h.1.attn.c_proj.weight"
    embedding = "transformer.wte.weight"
    for tensors, message in (
        ({k: v for k, v in language.items() if k != name}, f"llm: tensor {name} is missing"),
        ({k: v for k, v in language.items() if k != embedding}, f"llm: tensor {embedding} is missing"),
        ({**language, name: torch.ones(3, 3).bfloat16()}, "llm: decoder.layers.1.*expected .*, found"),
    ):
        save_file(tensors, llm / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            plan(vit, llm)


def test_a_language_model_in_torch_shards_with_buffers(tmp_path: Path) -> None:
    vit, llm = write_parts(tmp_path, TINY, vocab=90)
    execute_import(plan(vit, llm), tmp_path / "expected")
    (llm / "model.safetensors").unlink()
    buffers: dict[str, Tensor] = {
        "transformer.rotary_emb.inv_freq": torch.ones(4),
        "transformer.h.0.attn.rotary_emb.inv_freq": torch.ones(4),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.1.attn.logn_tensor": torch.ones(1, 8, 1, 1),
    }
    write_shards(llm, language_weights(TINY, 90) | buffers, safetensors=False)
    execute_import(plan(vit, llm), tmp_path / "megatron")
    assert verify(tmp_path / "megatron") == []
    assert compare(open_weights(tmp_path / "megatron"), open_weights(tmp_path / "expected")) == []


@pytest.mark.parametrize("safetensors", [True, False], ids=["safetensors", "bin"])
def test_the_index_says_which_file_a_tensor_comes_from(tmp_path: Path, safetensors: bool) -> None:
    hf = write_hf(tmp_path / "p", TINY, random_weights(TINY), safetensors)
    expected = write_hf(tmp_path / "expected", TINY, random_weights(TINY))
    first, second = sorted(p for p in hf.iterdir() if p.suffix in (".safetensors", ".bin"))
    load = load_file if safetensors else torch.load
    save = save_file if safetensors else torch.save
    a, b = load(first), load(second)
    name = next(iter(b))
    save({**a, name: b[name] + 1}, first)  # a stale copy in a file that the index does not name for it
    save({**b, next(iter(a)): a[next(iter(a))] + 1}, second)
    assert compare(open_weights(hf), open_weights(expected)) == []
    save({k: v for k, v in b.items() if k != name}, second)
    with pytest.raises(CheckpointError, match=rf"{second.name}: tensor {name} is missing, but the index"):
        plan_qwenvl(hf)


WRONG_VALUES: list[tuple[tuple[str, ...], Any]] = [
    (("visual", "mlp_ratio"), "4.9231"),
    (("visual", "mlp_ratio"), math.inf),
    (("visual", "mlp_ratio"), None),
    (("visual", "width"), "wide"),
    (("visual", "output_dim"), [4096]),
    (("visual", "layers"), "many"),
    (("visual", "image_size"), "448 pixels"),
    (("visual",), "none"),
    (("rotary_emb_base",), "ten thousand"),
    (("intermediate_size",), {}),
    (("layer_norm_epsilon",), "tiny"),
    (("num_attention_heads",), 0),
]


@pytest.mark.parametrize(("keys", "value"), WRONG_VALUES, ids=str)
def test_a_wrong_value_in_the_configuration_is_an_error_with_its_place(
    tmp_path: Path, keys: tuple[str, ...], value: Any
) -> None:
    hf = write_hf(tmp_path / "p", TINY, random_weights(TINY))
    config = config_json(TINY, 448)
    place: Any = config
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    if keys == ("visual", "output_dim"):
        del place["adapter_heads"]
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"p/config.json: "):
        plan_qwenvl(hf)


def with_table(folder: Path, table: Tensor) -> Path:
    weights = random_weights(MIDDLE, table.dtype)
    return write_hf(folder, MIDDLE, {**weights, TABLE: table})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_table_that_is_not_the_computed_one_is_noted_or_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """The table is not stored but computed, so a round trip is bitwise only if it is the computed one to the bit."""
    exact = sincos_table(16, 256).to(dtype)
    assert not [note for note in plan_qwenvl(with_table(tmp_path / "exact", exact)).notes if "note" in note]
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    near, far = exact.clone(), exact.clone()
    near[3, 200] = exact[3, 200] - step
    far[3, 200] = exact[3, 200] - 4 * (step if dtype is torch.bfloat16 else 10 * step)
    assert not torch.equal(near, exact)
    (note,) = [note for note in plan_qwenvl(with_table(tmp_path / "near", near)).notes if "note" in note]
    assert f"{TABLE}: 1 of 65,536 elements differ in rounding" in note
    with pytest.raises(CheckpointError, match="not the constant sin-cos table"):
        plan_qwenvl(with_table(tmp_path / "far", far))


def test_a_widened_table_is_noted(tmp_path: Path) -> None:
    """A bf16 model saved as float32 has a table of bf16's precision."""
    widened = sincos_table(16, 256).to(torch.bfloat16).float()
    notes = plan_qwenvl(with_table(tmp_path / "p", widened)).notes
    assert any("differ in rounding" in note for note in notes)
