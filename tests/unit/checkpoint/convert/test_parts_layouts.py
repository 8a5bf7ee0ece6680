"""Weights made of parts, and weights in bf16, through real sharded models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights
from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_parts, plan_qwenvl
from megatron_qwenvl.checkpoint.convert.inspect import verify
from megatron_qwenvl.checkpoint.run.manager import CheckpointManager
from megatron_qwenvl.checkpoint.run.weights import load_weights, model_state
from megatron_qwenvl.config.schema import ModelConfig, RunConfig
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.model.build import build_stage
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks
from tests.distributed.model_cases import small_config

from ..hf_cases import MIDDLE, TINY, random_weights, write_hf, write_parts

pytestmark = pytest.mark.slow


def config_of(model: ModelConfig, **changes: object) -> RunConfig:
    """TP 2 x PP 2."""
    config = small_config(tensor=2, pipeline=2, sequence_parallel=True)
    return config.model_copy(update={"model": model, **changes})


def load_and_save(process: ProcessInfo, weights: Path, config: RunConfig, out: Path) -> None:
    """Into sharded models and out again, in the weights' own precision."""
    runtime = start_engine(config, process)
    stage = build_stage(config, runtime, make_partition(config, runtime.data_size))
    if config.train.precision == "bf16":
        stage.bfloat16()
    load_weights(weights, config, stage)
    CheckpointManager(out, config).save(1, model_state(stage), {}, {})


def test_parts_load_into_a_sharded_stage_1(tmp_path: Path) -> None:
    """The language model has fewer rows than the model and comes in bf16, the ViT in float32; the run computes in
    float32 and holds every value."""
    vit, llm = write_parts(tmp_path / "parts", TINY, vocab=90)
    config = config_of(TINY, stage="stage1")
    execute_import(plan_parts(vit, llm, config, seed=1), tmp_path / "megatron")
    run_ranks(4, load_and_save, tmp_path / "megatron", config, tmp_path / "run")
    assert verify(tmp_path / "run") == []
    assert compare(open_weights(tmp_path / "run"), open_weights(tmp_path / "megatron"), tolerance=1e-30) == []


def test_bf16_weights_pass_through_a_layout_bitwise(tmp_path: Path) -> None:
    weights = random_weights(MIDDLE, torch.bfloat16)
    hf = write_hf(tmp_path / "hf", MIDDLE, weights)
    execute_import(plan_qwenvl(hf), tmp_path / "megatron")
    config = config_of(MIDDLE)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "bf16"})})
    run_ranks(4, load_and_save, tmp_path / "megatron", config, tmp_path / "run")
    saved = open_weights(tmp_path / "run")
    assert {spec.dtype for spec in saved.specs.values()} == {torch.bfloat16}
    assert compare(saved, open_weights(hf)) == []
