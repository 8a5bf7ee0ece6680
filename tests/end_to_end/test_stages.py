"""The three stages in a row, each in another layout, over real shards, through the tools that a user calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_qwenvl.checkpoint.storage.manifest import read_manifest
from megatron_qwenvl.checkpoint.storage.run_folder import find_checkpoint
from megatron_qwenvl.config.load import load_config
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.rendering.tokenizer import load_tokenizer
from megatron_qwenvl.data.sampling.sampler import open_training_sampler
from megatron_qwenvl.data.shards.indexing import IndexJob, index_directory
from megatron_qwenvl.demo.answers import Answers
from megatron_qwenvl.demo.dataset import make_demo_data
from megatron_qwenvl.demo.examination import read_questions
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.inference.generate import Generator
from megatron_qwenvl.model.shapes import count_parameters
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks
from tests.unit.data.test_tools import run_tool

from .training_cases import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    make_demo_data(out, train=1500, held_out=24, seed=0)
    for folder in sorted({path.parent for path in out.glob("**/*.tar")}):
        index_directory(folder, IndexJob())
    return out


def tiny(stage: str, data: Path, run_dir: Path, *overrides: str, world: int = 1) -> RunConfig:
    return load_config(
        f"tiny_{stage}",
        [
            "--data.root", str(data), "--run_dir", str(run_dir), "--data.workers", "0", "--train.steps", "3",
            "--data.global_batch_size", "24", "--optimizer.warmup_steps", "1", "--train.validation_interval", "3",
            "--train.validation_samples", "16", "--logging.tensorboard", "false", *overrides,
        ],
        world_size=world,
    )  # fmt: skip


def answers_of(process: ProcessInfo, config: RunConfig, checkpoint: Path, data: Path) -> list[str]:
    runtime = start_engine(config, process)
    tokenizer = load_tokenizer(None)
    generator = Generator.load(checkpoint, config, tokenizer, runtime)
    return Answers(generator, config, tokenizer, max_new_tokens=4)(read_questions(data / "test" / "vqa"))


def part_of(
    weights: list[list[tuple[str, Any, torch.Tensor]]], prefixes: tuple[str, ...]
) -> dict[Any, torch.Tensor]:
    return {
        (key, tuple(offset)): value
        for rank in weights
        for key, offset, value in rank
        if key.startswith(prefixes)
    }


def test_three_stages_in_three_layouts(data: Path, tmp_path: Path) -> None:
    layout = ["--parallel.tensor", "2", "--parallel.pipeline", "2", "--parallel.sequence_parallel", "true"]
    run_ranks(4, train, tiny("stage1", data, tmp_path / "stage1", *layout, world=4))
    start2, start3 = tmp_path / "start2", tmp_path / "start3"
    move = ["next-stage", "--from", str(tmp_path / "stage1"), "--to", "stage2", "--out", str(start2)]
    assert run_tool("convert_checkpoint.py", *move).returncode == 0
    second = tiny("stage2", data, tmp_path / "stage2", "--checkpoint.init_from", str(start2), world=2)
    run_ranks(2, train, second)
    move = ["next-stage", "--from", str(tmp_path / "stage2"), "--to", "stage3", "--out", str(start3)]
    assert run_tool("convert_checkpoint.py", *move).returncode == 0
    third = tiny("stage3", data, tmp_path / "stage3", "--checkpoint.init_from", str(start3))
    (done,) = run_ranks(1, train, third)
    assert done["progress"].step == 3
    manifest = read_manifest(find_checkpoint(tmp_path / "stage3"))
    assert (manifest.origin, manifest.step) == ("stage3", 3)
    (answers,) = run_ranks(1, answers_of, third, tmp_path / "stage3", data)
    assert len(answers) == 24


def test_frozen_parts_keep_their_weights_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """Stage 1 leaves the decoder, stage 3 the ViT as it was, weight decay included, without optimizer state."""
    frozen = {"stage1": ("decoder", "embedding", "output_layer"), "stage3": ("vit", "patch_embed")}
    for stage, prefixes in frozen.items():
        before = run_ranks(1, train, tiny(stage, data, tmp_path / f"{stage}_1", "--train.stop_after", "1"))
        after = run_ranks(1, train, tiny(stage, data, tmp_path / f"{stage}_3"))
        a, b = ([rank["weights"] for rank in ranks] for ranks in (before, after))
        still = part_of(a, prefixes)
        assert still and all(torch.equal(value, part_of(b, prefixes)[key]) for key, value in still.items())
        trained = sum(count[1] for count in count_parameters(tiny(stage, data, tmp_path)).values())
        assert sum(moments["exp_avg"].numel() for moments in after[0]["state"]) == trained
        moving = part_of(a, ("adapter",))
        assert any(not torch.equal(value, part_of(b, ("adapter",))[key]) for key, value in moving.items())


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_packs_of_the_demo_are_filled(stage: str, data: Path) -> None:
    """At least 95% of the positions that the tiny recipes compute on the demo's mix are tokens."""
    config = load_config(f"tiny_{stage}", ["--data.root", str(data)])
    sampler = open_training_sampler(config, load_tokenizer(None).fingerprint)
    batches = [sampler.global_batch(step) for step in range(5)]
    tokens = sum(int(batch.samples.length.sum()) for batch in batches)
    assert tokens / sum(sampler.positions(batch, 1) for batch in batches) >= 0.95


def test_large_interleaved_batches_of_the_demo_mix_are_filled(data: Path) -> None:
    """Same-task packs need enough samples per task: at stage 2's batch of 4,096 they are 95% full as they are."""
    config = load_config(
        "tiny_stage2",
        ["--data.root", str(data), "--data.packing", "interleaved", "--data.global_batch_size", "4096",
         "--data.pack_length", "1024"],
    )  # fmt: skip
    sampler = open_training_sampler(config, load_tokenizer(None).fingerprint)
    batch = sampler.global_batch(0)
    assert int(batch.samples.length.sum()) / (len(batch.packs) * 1024) >= 0.95
