"""NaN and infinity in weights: found in every type, named with their place, and not passed on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_qwenvl.checkpoint.convert.exports import execute_export, plan_export
from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_parts, plan_qwenvl
from megatron_qwenvl.checkpoint.convert.inspect import verify
from megatron_qwenvl.checkpoint.convert.next_stage import execute_next_stage, plan_transition
from megatron_qwenvl.checkpoint.run.manager import CheckpointManager
from megatron_qwenvl.checkpoint.storage import differences
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.non_finite import NonFinite, find_non_finite, merged
from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks

from ..cases import join, saving, state
from ..hf_cases import TINY, open_clip_weights, random_weights, write_hf, write_parts

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf], ids=str)
def test_every_kind_is_found_in_every_type(dtype: torch.dtype, value: float) -> None:
    shape = (3, differences.BLOCK_ELEMENTS + 5)
    tensor = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
    tensor[1] = torch.finfo(dtype).min
    tensor[2] = -0.0
    assert find_non_finite("t", tensor) is None
    tensor[2, -1] = tensor[2, 7] = value
    if math.isnan(value):  # a NaN with the sign bit
        tensor[2, 7] = torch.tensor(value, dtype=dtype).copysign(torch.tensor(math.copysign(1.0, value)))
    assert find_non_finite("t", tensor) == NonFinite("t", 2, (2, 7))
    assert find_non_finite("t", tensor.t(), (10, 0)) == NonFinite("t", 2, (17, 2))


def test_a_nan_with_any_payload_is_found() -> None:
    for bits in (0x7F81, 0x7FFF, -1, -127):  # the smallest and largest NaN of either sign
        tensor = torch.zeros(9, dtype=torch.int16)
        tensor[4] = bits
        assert find_non_finite("t", tensor.view(torch.bfloat16)) == NonFinite("t", 1, (4,))
    assert find_non_finite("t", torch.full((3,), -1)) is None
    assert find_non_finite("t", torch.empty(0, 4)) is None
    assert find_non_finite("t", torch.tensor(math.inf)) == NonFinite("t", 1, ())


def test_parts_of_a_tensor_are_one_entry() -> None:
    parts = [NonFinite("a", 2, (9, 1)), NonFinite("b", 1, (0,)), NonFinite("a", 3, (4, 7))]
    assert merged(parts) == [NonFinite("a", 5, (4, 7)), NonFinite("b", 1, (0,))]


def damaged_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights in which an embedding row, a stacked and a rearranged tensor are damaged."""
    weights = random_weights(TINY, dtype)
    weights["transformer.wte.weight"][90, 5:7] = math.inf
    weights["transformer.h.1.mlp.w1.weight"][3, 4] = math.nan
    weights["transformer.visual.proj"][2, 9] = -math.inf
    return weights


EXPECTED = ("transformer.wte.weight: 2 not finite (NaN or infinity), the first at [90, 5]",
            "transformer.h.1.mlp.w1.weight: 1 not finite (NaN or infinity), the first at [3, 4]",
            "transformer.visual.proj: 1 not finite (NaN or infinity), the first at [2, 9]")  # fmt: skip
OURS = ("embedding.word_embeddings.weight: 2 not finite (NaN or infinity), the first at [90, 5]",
        "decoder.layers.1.mlp.linear_fc1.weight: 1 not finite (NaN or infinity), the first at [51, 4]",
        "adapter.proj.weight: 1 not finite (NaN or infinity), the first at [9, 2]")  # fmt: skip


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """The checkpoint that importing damaged weights leaves."""
    plan = plan_qwenvl(write_hf(tmp_path / "hf", TINY, damaged_weights()))
    with pytest.raises(CheckpointError) as caught:
        execute_import(plan, tmp_path / "megatron")
    assert all(text in str(caught.value) for text in EXPECTED)
    return tmp_path / "megatron"


def test_verify_names_the_tensors(damaged: Path) -> None:
    """Every problem is one tensor, though the chunks of two lie apart."""
    problems = verify(damaged)
    assert sorted(problems) == sorted(f"{damaged}: {text}" for text in OURS)


@pytest.mark.parametrize("command", ["next-stage", "export"])
def test_what_goes_on_from_them_is_refused_and_leaves_nothing(
    damaged: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError) as caught:
        if command == "export":
            execute_export(plan_export(damaged), out)
        else:
            execute_next_stage(plan_transition(damaged, "stage2"), out)
    assert all(text in str(caught.value) for text in OURS)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("part", ["vit", "llm"])
def test_parts_are_looked_at_too(tmp_path: Path, part: str) -> None:
    from safetensors.torch import load_file, save_file

    vit, llm = write_parts(tmp_path, TINY, vocab=90)
    if part == "vit":
        weights = open_clip_weights(TINY)
        weights["visual.class_embedding"][0] = math.nan  # is not imported
        name = "visual.transformer.resblocks.1.attn.in_proj_weight"
        file = vit / "open_clip_model.safetensors"
    else:
        file = llm / "model.safetensors"
        weights, name = load_file(file), "lm_head.weight"
    weights[name][8, 1] = math.nan
    save_file(weights, file)
    recipe = RECIPES["tiny_stage1"]().model_copy(update={"model": TINY})
    with pytest.raises(CheckpointError) as caught:
        execute_import(plan_parts(vit, llm, recipe, seed=1), tmp_path / "megatron")
    assert f"{name}: 1 not finite (NaN or infinity), the first at [8, 1]" in str(caught.value)


def test_many_damaged_tensors_are_counted(tmp_path: Path) -> None:
    weights = {name: value.fill_(math.nan) if "resblocks" in name else value
               for name, value in random_weights(TINY).items()}  # fmt: skip
    with pytest.raises(CheckpointError, match=r"and \d+ more tensors"):
        execute_import(plan_qwenvl(write_hf(tmp_path / "p", TINY, weights)), tmp_path / "megatron")


def save_damaged_optimizer(process: ProcessInfo, folder: Path) -> None:
    join(process)
    optimizer = state(1)
    optimizer["matrix"].data[0, 1] = math.nan
    CheckpointManager(folder, saving()).save(1, state(1), optimizer, {})


def test_verify_looks_at_the_optimizer_too(tmp_path: Path) -> None:
    run_ranks(1, save_damaged_optimizer, tmp_path)
    (problem,) = [text for text in verify(tmp_path / "step_00000001") if "not finite" in text]
    assert "1 not finite (NaN or infinity), the first at [0, 1]" in problem
