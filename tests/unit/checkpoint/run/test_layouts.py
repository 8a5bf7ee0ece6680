"""Imported weights through real sharded models, and a run's state from one layout to another."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights
from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_qwenvl
from megatron_qwenvl.checkpoint.convert.inspect import verify
from megatron_qwenvl.checkpoint.run.manager import CheckpointManager
from megatron_qwenvl.checkpoint.run.weights import (
    check_start,
    fill_model,
    load_weights,
    model_state,
)
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import read_manifest
from megatron_qwenvl.checkpoint.storage.run_folder import find_checkpoint
from megatron_qwenvl.config.schema import AdapterConfig, DecoderConfig, ModelConfig, RunConfig, VisionConfig
from megatron_qwenvl.engine.optimizer import optimizer_state
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.model.build import build_stage
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.optimizer import Schedule, build_optimizer
from megatron_qwenvl.training.step import StepReport, StepRunner
from tests.distributed.harness import run_ranks
from tests.distributed.model_cases import build_runner, make_batch, share, small_config
from tests.reference_model import ReferenceModel

from ..cases import failing
from ..hf_cases import random_weights, write_hf

pytestmark = pytest.mark.slow

EIGHT_HEADS = ModelConfig(
    vision=VisionConfig(layers=4, width=32, heads=8, mlp_hidden=48, position_grid=4),
    adapter=AdapterConfig(query_grid=2, heads=8),
    decoder=DecoderConfig(layers=3, hidden=48, heads=8, ffn_hidden=64, vocab_size=128),
)


def config_of(model: ModelConfig, image_size: int = 56, **parallel: Any) -> RunConfig:
    return small_config(image_size=image_size, **parallel).model_copy(update={"model": model})


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    weights = random_weights(EIGHT_HEADS)
    execute_import(plan_qwenvl(write_hf(folder / "hf", EIGHT_HEADS, weights)), folder / "megatron")
    return folder


def load_and_save(process: ProcessInfo, weights: Path, config: RunConfig, out: Path) -> None:
    """Into sharded models and out again."""
    runtime = start_engine(config, process)
    stage = build_stage(config, runtime, make_partition(config, runtime.data_size))
    load_weights(weights, config, stage)
    CheckpointManager(out, config).save(1, model_state(stage), {}, {})


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_weights_pass_through_every_layout_bitwise(
    tmp_path: Path, imported: Path, tensor: int, pipeline: int
) -> None:
    config = config_of(EIGHT_HEADS, tensor=tensor, pipeline=pipeline, sequence_parallel=tensor > 1)
    run_ranks(tensor * pipeline, load_and_save, imported / "megatron", config, tmp_path)
    saved = open_weights(tmp_path)
    assert compare(saved, open_weights(imported / "megatron")) == []
    assert compare(saved, open_weights(imported / "hf")) == []
    assert verify(tmp_path) == []
    assert read_manifest(find_checkpoint(tmp_path)).parallel_sizes["tensor"] == tensor


def logits(process: ProcessInfo, weights: Path, config: RunConfig) -> Tensor:
    runtime = start_engine(config, process)
    stage = build_stage(config, runtime, make_partition(config, 1)).eval()
    load_weights(weights, config, stage)
    batch = make_batch(3, 2, config)
    batch.cu_seqlens = torch.tensor([0, batch.length], dtype=torch.int32)
    batch.position_ids = torch.arange(batch.length)
    batch.labels = None
    with torch.no_grad():
        return stage(batch, torch.arange(batch.length))


@pytest.mark.parametrize("image_size", [56, 112], ids=["base resolution", "doubled resolution"])
def test_logits_of_imported_weights_equal_the_published_formulas(tmp_path: Path, image_size: int) -> None:
    reference = ReferenceModel(EIGHT_HEADS).eval()
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: value if name.endswith("pos_embed") else 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in reference.state_dict().items()
    }
    reference.load_state_dict(weights)
    execute_import(plan_qwenvl(write_hf(tmp_path / "hf", EIGHT_HEADS, weights)), tmp_path / "megatron")
    config = config_of(EIGHT_HEADS, image_size)
    (megatron,) = run_ranks(1, logits, tmp_path / "megatron", config)
    batch = make_batch(3, 2, config)
    with torch.no_grad():
        hf = reference(batch.tokens[None], batch.pixels, [(0, int(start)) for start in batch.image_starts])
    assert hf.std() > 0.1
    torch.testing.assert_close(megatron, hf[0], atol=2e-5, rtol=1e-4)


def start_elsewhere(process: ProcessInfo, weights: Path, config: RunConfig) -> str:
    runtime = start_engine(config, process)
    stage = build_stage(config, runtime, make_partition(config, 1))
    return failing(lambda: load_weights(weights, config, stage))


def test_weights_of_another_model_are_refused_by_field(imported: Path) -> None:
    other = EIGHT_HEADS.model_copy(update={"vision": EIGHT_HEADS.vision.model_copy(update={"heads": 4})})
    (message,) = run_ranks(1, start_elsewhere, imported / "megatron", config_of(other))
    assert "vision.heads: expected 4, found 8" in message


def test_weights_made_for_another_stage_are_refused(imported: Path) -> None:
    manifest = read_manifest(imported / "megatron")
    config = config_of(EIGHT_HEADS)
    assert config.stage == "stage2"
    for start_of in (None, "stage2"):
        check_start(imported, manifest.model_copy(update={"start_of": start_of}), config)
    with pytest.raises(CheckpointError, match="made to start stage3, but this run is stage2"):
        check_start(imported, manifest.model_copy(update={"start_of": "stage3"}), config)


def test_damaged_weights_are_refused_by_file(tmp_path: Path) -> None:
    weights = random_weights(EIGHT_HEADS)
    execute_import(plan_qwenvl(write_hf(tmp_path / "hf", EIGHT_HEADS, weights)), tmp_path / "megatron")
    file = tmp_path / "megatron/model/__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    (message,) = run_ranks(1, start_elsewhere, tmp_path / "megatron", config_of(EIGHT_HEADS))
    assert "model/__0_0.distcp: damaged" in message


STEPS = 4
SAVED = 2


def optimizing_config(**parallel: Any) -> RunConfig:
    """Layer-wise learning rates and a sharded optimizer."""
    config = small_config(**parallel)
    optimizer = config.optimizer.model_copy(
        update={"sharded": True, "vit_layer_decay": 0.5, "lr": 1e-2, "warmup_steps": 1}
    )
    train = config.train.model_copy(update={"steps": STEPS, "clip_grad": 1.0})
    return config.model_copy(update={"optimizer": optimizer, "train": train})


def train(process: ProcessInfo, config: RunConfig, folder: Path, resume: bool) -> list[StepReport]:
    """Train from the start, saving after `SAVED` steps, or from the saved step; returns the later reports."""
    runner: StepRunner = build_runner(process, config)
    optimizer = build_optimizer(runner.model, config)
    manager = CheckpointManager(folder, config)
    if resume:
        with torch.no_grad():
            model = model_state(runner.model.module)
            wanted = optimizer_state(optimizer, model, loading=True)
            newest = manager.latest()
            assert newest is not None
            loaded = manager.load(newest, model, wanted)
            fill_model(runner.model.module, loaded.model)
            optimizer.load_state_dict(loaded.optimizer)
    schedule = Schedule(optimizer, config)
    reports = []
    for step in range(SAVED if resume else 0, STEPS):
        if step == SAVED and not resume:
            for group in optimizer.param_groups:
                group["step"] = step
            model = model_state(runner.model.module)
            state = optimizer_state(optimizer, model)
            manager.save(step, model, state, {"step": step})
        schedule.set_step(step)
        batches = [make_batch(10 * step + i, 1 + i % 3, config) for i in range(4)]
        report = runner.train(share(runner, batches), optimizer)
        reports.append(report)
    return reports[-(STEPS - SAVED) :]


LAYOUTS = {
    "same": (1, {}),
    "TP 2": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP 2": (2, {"pipeline": 2}),
    "DP 2": (2, {}),
    "TP 2 x PP 2": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
}


@pytest.mark.parametrize("saved_by", ["same", "TP 2 x PP 2"])
def test_training_continues_in_any_layout(tmp_path: Path, saved_by: str) -> None:
    """Losses and gradient norms after resuming are those of the run that went on: bit for bit in the same layout,
    to rounding in others. A wrong moment, master weight, step count or learning-rate group would show."""
    ranks, parallel = LAYOUTS[saved_by]
    going_on = run_ranks(ranks, train, optimizing_config(**parallel), tmp_path, False)[0]
    assert verify(tmp_path) == []
    for name, (ranks, parallel) in LAYOUTS.items():
        resumed = run_ranks(ranks, train, optimizing_config(**parallel), tmp_path, True)[0]
        if parallel == LAYOUTS[saved_by][1] and ranks == LAYOUTS[saved_by][0]:
            assert [asdict(report) for report in resumed] == [asdict(report) for report in going_on]
        for mine, expected in zip(resumed, going_on, strict=True):
            assert mine.loss == pytest.approx(expected.loss, rel=2e-5), name
            assert mine.grad_norm == pytest.approx(expected.grad_norm, rel=2e-4), name
