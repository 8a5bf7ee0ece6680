"""Saves while training goes on, saves that fail, and checkpoints that are kept."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_qwenvl.checkpoint.files import CheckpointError
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.runtime import engine
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.loop import Trainer
from tests.distributed.harness import run_ranks

from .training_cases import records, run_config, train, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def test_background_saves_resume_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """A save that is written while the weights change holds the weights of its own step."""
    saving = ["--checkpoint.asynchronous", "true", "--checkpoint.interval", "2"]
    straight = run_ranks(2, train, run_config(data, tmp_path / "straight", world=2))
    run_ranks(2, train, run_config(data, tmp_path / "resumed", *saving, "--train.stop_after", "7", world=2))
    saves = records(tmp_path / "resumed", "save")
    assert [record["step"] for record in saves] == [2, 4, 6, 7]
    resumed = run_ranks(2, train, run_config(data, tmp_path / "resumed", *saving, world=2))
    for a, b in zip(straight, resumed, strict=True):
        for (key, _, x), (_, _, y) in zip(a["weights"], b["weights"], strict=True):
            assert torch.equal(x, y), key


def test_kept_checkpoints(data: Path, tmp_path: Path) -> None:
    saving = ["--checkpoint.interval", "1", "--checkpoint.keep_last", "2", "--checkpoint.keep_every", "4"]
    run_ranks(1, train, run_config(data, tmp_path / "run", *saving))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert kept == ["step_00000004", "step_00000008", "step_00000009", "step_00000010"]


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_a_full_disk_keeps_the_old_checkpoint(on_failure: str, data: Path, tmp_path: Path) -> None:
    """Writing fails in the middle of a file; the run stops or goes on as told, and another one continues exactly."""
    run_dir = tmp_path / "run"
    saving = ["--checkpoint.interval", "3", "--checkpoint.on_failure", on_failure]
    run_ranks(2, train, run_config(data, run_dir, *saving, "--train.stop_after", "3", world=2))
    results = run_ranks(2, train_without_room, run_config(data, run_dir, *saving, world=2))
    if on_failure == "stop":
        assert all("File too large" in result for result in results)
    else:
        assert all(
            "step 10: the last checkpoint of the run could not be saved" in result for result in results
        )
        assert [record["step"] for record in records(run_dir, "save_failed")] == [6, 9, 10]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", "step_00000003"]
    resumed = run_ranks(2, train, run_config(data, run_dir, *saving, world=2))
    straight = run_ranks(2, train, run_config(data, tmp_path / "straight", world=2))
    for a, b in zip(straight, resumed, strict=True):
        assert all(torch.equal(x, y) for (_, _, x), (_, _, y) in zip(a["weights"], b["weights"], strict=True))


def train_without_room(process: ProcessInfo, config: RunConfig) -> Any:
    """Train where no file can grow beyond 40 kB: the steps done, or the error."""
    trainer = Trainer.build(config, engine.start(config, process))
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    try:
        return trainer.run().step
    except CheckpointError as error:
        return str(error)
