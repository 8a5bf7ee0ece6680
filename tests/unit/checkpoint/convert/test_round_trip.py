"""Published weights in and out: bitwise round trips, and the places where a plausible mistake would hide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights
from megatron_qwenvl.checkpoint.convert.exports import execute_export, plan_export
from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_parts, plan_qwenvl
from megatron_qwenvl.checkpoint.convert.inspect import verify
from megatron_qwenvl.checkpoint.convert.mapped_source import megatron_specs
from megatron_qwenvl.checkpoint.formats.chunk_grid import chunk_grid
from megatron_qwenvl.checkpoint.formats.hf_config import hf_config, hf_limits
from megatron_qwenvl.checkpoint.formats.hf_files import HFWeights
from megatron_qwenvl.checkpoint.formats.names import open_clip_rules, qwenvl_rules
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import read_manifest
from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.config.schema import ModelConfig, RunConfig
from megatron_qwenvl.model.positions import sincos_table
from megatron_qwenvl.model.shapes import tensor_shapes

from ..hf_cases import (
    MIDDLE,
    TINY,
    as_hugging_face_clip,
    open_clip_weights,
    random_weights,
    write_hf,
    write_parts,
)

pytestmark = pytest.mark.slow


def load_published(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def import_qwenvl(folder: Path, out: Path) -> Path:
    execute_import(plan_qwenvl(folder), out)
    return out


@pytest.mark.parametrize("safetensors", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    ("model", "dtype"),
    [(TINY, torch.float32), (TINY, torch.bfloat16), (MIDDLE, torch.bfloat16)],
    ids=["tiny fp32", "tiny bf16", "middle bf16"],
)
def test_hf_to_megatron_to_hf_is_bitwise(
    tmp_path: Path, model: ModelConfig, dtype: torch.dtype, safetensors: bool
) -> None:
    weights = random_weights(model, dtype)
    weights["transformer.wte.weight"][0, :2] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 2])
    hf = write_hf(tmp_path / "hf", model, weights, safetensors)
    checkpoint = import_qwenvl(hf, tmp_path / "megatron")
    assert verify(checkpoint) == []
    execute_export(plan_export(checkpoint), tmp_path / "again")
    again = load_published(tmp_path / "again")
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        if name.endswith("pos_embed"):  # a constant; the test's reference computes it by another library
            torch.testing.assert_close(
                again[name], value, atol=1e-2 if dtype is torch.bfloat16 else 1e-5, rtol=0
            )
        else:
            assert torch.equal(again[name].view(torch.uint8), value.view(torch.uint8)), name
    assert plan_qwenvl(tmp_path / "again").manifest.model == read_manifest(checkpoint).model == model


def test_export_can_be_read_by_others_and_describes_the_model(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", MIDDLE, random_weights(MIDDLE, torch.bfloat16))
    (tmp_path / "qwen.tiktoken").write_text("tokens")
    out = tmp_path / "again"
    execute_export(plan_export(import_qwenvl(hf, tmp_path / "megatron"), tmp_path / "qwen.tiktoken"), out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118  (the library's object is not a dictionary)
    config = json.loads((out / "config.json").read_text())
    assert (config["torch_dtype"], config["bf16"], config["intermediate_size"]) == ("bfloat16", True, 2 * 688)
    assert config["visual"]["image_size"] == 448
    assert int(config["visual"]["width"] * config["visual"]["mlp_ratio"]) == 1024
    assert (out / "qwen.tiktoken").read_text() == "tokens"


def test_full_size_config_is_the_published_one() -> None:
    config = hf_config(ModelConfig(), 448, "bfloat16")
    assert config["visual"] == {
        "heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48, "mlp_ratio": 4.9231,
        "n_queries": 256, "output_dim": 4096, "patch_size": 14, "width": 1664,
    }  # fmt: skip
    assert (config["intermediate_size"], config["vocab_size"]) == (22016, 151936)
    assert hf_limits(ModelConfig()) == []
    assert len(hf_limits(TINY)) == 2


def test_rules_cover_every_tensor_of_both_sides_at_full_size() -> None:
    rules = qwenvl_rules(ModelConfig())
    megatron = [name for rule in rules for name in rule.megatron]
    hf = [name for rule in rules for name in rule.hf]
    assert sorted(megatron) == sorted(tensor_shapes(ModelConfig()))
    assert len(hf) == len(set(hf)) == 853 - 1  # without the constant table


def test_table_is_column_first() -> None:
    table = sincos_table(3, 8)
    assert table.shape == (9, 8)
    row1_column2 = table[1 * 3 + 2]
    frequencies = torch.tensor([1.0, 0.01])
    expected = [f(p * frequencies) for p in (2.0, 1.0) for f in (torch.sin, torch.cos)]
    torch.testing.assert_close(row1_column2, torch.cat(expected))


def imported(tmp_path: Path, hf: Path) -> dict[str, Tensor]:
    source = open_weights(import_qwenvl(hf, tmp_path / "megatron"))
    return {name: source.read(name) for name in source.specs}


def test_decoder_rows_are_grouped_by_head(tmp_path: Path) -> None:
    """Ours: head 0's q, k, v rows, then head 1's. Published: all q, then all k, then all v."""
    weights = random_weights(TINY)
    megatron = imported(tmp_path, write_hf(tmp_path / "p", TINY, weights))
    c_attn, mine = (
        weights["transformer.h.1.attn.c_attn.weight"],
        megatron["decoder.layers.1.self_attention.linear_qkv.weight"],
    )
    hidden, width = TINY.decoder.hidden, TINY.decoder.hidden // TINY.decoder.heads
    for head in range(TINY.decoder.heads):
        for part in range(3):
            theirs_at, ours_at = part * hidden + head * width, (head * 3 + part) * width
            assert torch.equal(mine[ours_at : ours_at + width], c_attn[theirs_at : theirs_at + width])


def test_published_vit_rows_are_grouped_by_head_already(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    megatron = imported(tmp_path, write_hf(tmp_path / "p", TINY, weights))
    for kind in ("weight", "bias"):
        hf = weights[f"transformer.visual.transformer.resblocks.1.attn.in_proj.{kind}"]
        assert torch.equal(megatron[f"vit.layers.1.self_attention.linear_qkv.{kind}"], hf)


def test_gate_comes_first_and_is_w2(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    megatron = imported(tmp_path, write_hf(tmp_path / "p", TINY, weights))
    gate, up = megatron["decoder.layers.0.mlp.linear_fc1.weight"].chunk(2)
    assert torch.equal(gate, weights["transformer.h.0.mlp.w2.weight"])
    assert torch.equal(up, weights["transformer.h.0.mlp.w1.weight"])


def test_adapter_projections_are_split_and_its_output_transposed(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    megatron = imported(tmp_path, write_hf(tmp_path / "p", TINY, weights))
    q, k, v = weights["transformer.visual.attn_pool.attn.in_proj_weight"].chunk(3)
    for part, expected in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(megatron[f"adapter.linear_{part}.weight"], expected)
    assert torch.equal(megatron["adapter.proj.weight"], weights["transformer.visual.proj"].t())


def recipe_of(model: ModelConfig) -> RunConfig:
    return RECIPES["tiny_stage1"]().model_copy(update={"model": model})


def test_open_clip_rows_class_token_and_positions(tmp_path: Path) -> None:
    vit, llm = write_parts(tmp_path, TINY, vocab=96)
    execute_import(plan_parts(vit, llm, recipe_of(TINY), seed=1), tmp_path / "megatron")
    megatron, hf = open_weights(tmp_path / "megatron"), open_clip_weights(TINY)
    positions = megatron.read("patch_embed.positional_embedding")
    assert torch.equal(positions, hf["visual.positional_embedding"][1:])
    mine = megatron.read("vit.layers.1.self_attention.linear_qkv.bias")
    in_proj = hf["visual.transformer.resblocks.1.attn.in_proj_bias"]
    width = TINY.vision.width // TINY.vision.heads
    for head in range(TINY.vision.heads):
        for part in range(3):
            theirs_at = part * TINY.vision.width + head * width
            ours_at = (head * 3 + part) * width
            assert torch.equal(mine[ours_at : ours_at + width], in_proj[theirs_at : theirs_at + width])


def test_hugging_face_clip_gives_the_same_as_open_clip(tmp_path: Path) -> None:
    vit, llm = write_parts(tmp_path, TINY, vocab=96)
    hugging_face = tmp_path / "hf"
    hugging_face.mkdir()
    torch.save(as_hugging_face_clip(open_clip_weights(TINY)), hugging_face / "pytorch_model.bin")
    for name, source in (("a", vit), ("b", hugging_face)):
        execute_import(plan_parts(source, llm, recipe_of(TINY), seed=1), tmp_path / name)
    assert compare(open_weights(tmp_path / "a"), open_weights(tmp_path / "b")) == []


def test_parts_pad_the_vocabulary_and_seed_the_adapter(tmp_path: Path) -> None:
    vit, llm = write_parts(tmp_path, TINY, vocab=90)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        execute_import(plan_parts(vit, llm, recipe_of(TINY), seed=seed), tmp_path / name)
    a, b, c = (open_weights(tmp_path / name) for name in "abc")
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        table = a.read(name)
        assert table.shape == (96, 32) and not table[90:].any() and table[:90].any(1).all()
    assert compare(a, b) == []
    differing = {line.split(":")[0] for line in compare(a, c)}
    assert {"adapter.query", "adapter.linear_q.weight", "adapter.proj.weight"} <= differing
    assert all(name.startswith("adapter.") for name in differing)
    assert float(a.read("adapter.query").float().abs().max()) <= 2.0
    manifest = read_manifest(tmp_path / "a")
    assert (manifest.origin, manifest.start_of) == ("parts", "stage1")


def test_import_refuses_what_does_not_fit(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    name = "transformer.h.1.mlp.w1.weight"
    cases = {
        "missing": ({k: v for k, v in weights.items() if k != name}, f"{name} is missing"),
        "shape": (
            {**weights, "transformer.ln_f.weight": torch.ones(7)},
            r"final_layernorm.weight: expected \[32\], found \[7\]",
        ),
        "unknown": ({**weights, "transformer.h.9.extra": torch.ones(1)}, "unknown tensors, the first: transformer.h.9"),
        "table": (
            {**weights, "transformer.visual.attn_pool.pos_embed": torch.ones(4, 32)}, "not the constant sin-cos table"
        ),
        "mixed types": ({**weights, name: weights[name].half()}, "differ in type"),
    }  # fmt: skip
    for case, (tensors, message) in cases.items():
        with pytest.raises(CheckpointError, match=message):
            plan_qwenvl(write_hf(tmp_path / case, TINY, tensors))


def test_import_refuses_other_heads_than_the_recipe(tmp_path: Path) -> None:
    """Shapes are blind to the number of heads; a wrong one would scramble rows silently."""
    vit, llm = write_parts(tmp_path, TINY, vocab=96)
    (llm / "config.json").write_text(json.dumps({"num_attention_heads": 8}))
    with pytest.raises(CheckpointError, match="num_attention_heads: expected 4, found 8"):
        plan_parts(vit, llm, recipe_of(TINY), seed=1)


def test_damaged_published_files_are_named(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "p", TINY, random_weights(TINY))
    shard = hf / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    for damaged, message in (
        (content[:-5], "expected .* bytes, found"),
        (b"x" * 100, "not a safetensors file"),
    ):
        shard.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"00002-of-00002.safetensors: {message}"):
            plan_qwenvl(hf)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors: missing"):
        plan_qwenvl(hf)


def test_a_torch_file_with_code_is_refused(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return (tmp_path / "ran").mkdir, ()

    file = tmp_path / "pytorch_model.bin"
    torch.save({"x": Code()}, file)
    with pytest.raises(CheckpointError, match="pytorch_model.bin: refused"):
        HFWeights(file)
    assert not (tmp_path / "ran").exists()


def test_compare_names_differences_and_honours_the_tolerance(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    first = write_hf(tmp_path / "a", TINY, weights)
    changed = {**weights, "transformer.ln_f.weight": weights["transformer.ln_f.weight"] + 1e-3}
    second = import_qwenvl(write_hf(tmp_path / "b", TINY, changed), tmp_path / "megatron")
    (line,) = compare(open_weights(first), open_weights(second))
    assert line.startswith("decoder.final_layernorm.weight: 32 of 32 elements differ, by 0.001")
    assert compare(open_weights(first), open_weights(second), tolerance=0.01) == []
    assert len(compare(open_weights(first), open_weights(second), tolerance=1e-4)) == 1


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_chunks_fit_every_tensor_parallel_rank(size: int) -> None:
    """A rank's part of a sharded tensor never needs a fraction of a chunk, at the published sizes."""
    for name, shape in tensor_shapes(ModelConfig()).items():
        axis, count = chunk_grid(name, shape)
        assert shape[axis] % count == 0
        if count > 1:
            assert count % size == 0, name


def test_specs_are_planned_without_reading(tmp_path: Path) -> None:
    weights = open_clip_weights(TINY)
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    source = HFWeights(tmp_path)
    from megatron_qwenvl.checkpoint.convert.mapped_source import MappedSource

    specs = megatron_specs(MappedSource(source, tuple(open_clip_rules(TINY))))
    expected = tensor_shapes(TINY)
    assert {name: spec.shape for name, spec in specs.items()} == {
        name: shape for name, shape in expected.items() if name.startswith(("patch_embed.", "vit."))
    }
