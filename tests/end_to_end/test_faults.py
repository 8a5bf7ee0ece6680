"""What a run does with bad data, numbers that are not finite, and inputs that do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_qwenvl.checkpoint.run.weights import model_state
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.errors import TrainingError
from megatron_qwenvl.training.optimizer import Schedule, build_optimizer
from tests.distributed.harness import run_ranks
from tests.distributed.model_cases import build_runner, make_batch, share, small_config

from .training_cases import records, run_config, train, write_data

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def train_or_error(process: ProcessInfo, config: Any) -> Any:
    """Like `train`; returns the type and text of an expected error instead of raising it."""
    try:
        return train(process, config)
    except (DataError, TrainingError) as error:
        return type(error).__name__, str(error)


def damage_images(shard: Path, every: int) -> int:
    """Overwrite the data (not the headers) of every n-th PNG in a tar; returns how many."""
    data = bytearray(shard.read_bytes())
    at, number, damaged = 0, 0, 0
    while (at := data.find(PNG_SIGNATURE, at)) >= 0:
        if number % every == 0:
            data[at + 40 : at + 60] = bytes(20)
            damaged += 1
        number, at = number + 1, at + 1
    shard.write_bytes(data)
    return damaged


def test_unreadable_images_are_masked_alike_in_every_layout(tmp_path: Path) -> None:
    """Ranks without pixels mask the same samples: losses agree, and the samples are counted."""
    source = write_data(tmp_path)
    assert damage_images(source / "000000.tar", every=3) >= 4
    one = run_config(tmp_path, tmp_path / "one", "--train.steps", "6")
    run_ranks(1, train, one)
    four = run_config(
        tmp_path,
        tmp_path / "four",
        "--train.steps",
        "6",
        "--parallel.tensor",
        "2",
        "--parallel.pipeline",
        "2",
        world=4,
    )
    run_ranks(4, train, four)
    alone, spread = records(tmp_path / "one"), records(tmp_path / "four")
    assert sum(record["unreadable_samples"] for record in alone) >= 4
    for key in ("unreadable_samples", "loss_tokens", "samples"):
        assert [r[key] for r in alone] == [r[key] for r in spread]
    assert [r["loss"] for r in alone] == pytest.approx([r["loss"] for r in spread], abs=2e-5)
    whole = write_data(tmp_path / "whole")
    assert whole.exists()
    run_ranks(1, train, run_config(tmp_path / "whole", tmp_path / "good", "--train.steps", "6"))
    good = records(tmp_path / "good")
    assert sum(r["loss_tokens"] for r in good) > sum(r["loss_tokens"] for r in alone)


def test_a_missing_shard_stops_the_run_with_its_name(tmp_path: Path) -> None:
    source = write_data(tmp_path)
    (source / "000001.tar").unlink()
    (result,) = run_ranks(1, train_or_error, run_config(tmp_path, tmp_path / "run"))
    assert result[0] == "DataError" and "000001.tar" in result[1]


def test_numbers_that_are_not_finite_stop_the_run_after_the_limit(tmp_path: Path) -> None:
    """An absurd learning rate ruins the weights in the first update; every later step is skipped."""
    write_data(tmp_path)
    config = run_config(
        tmp_path, tmp_path / "run", "--optimizer.lr", "1e30", "--train.max_skipped_steps", "3", "--train.steps", "20",
        "--optimizer.warmup_steps", "0", "--parallel.tensor", "2", world=2,
    )  # fmt: skip
    results = run_ranks(2, train_or_error, config)
    assert {result[0] for result in results} == {"TrainingError"}
    assert all("4 steps in a row" in result[1] for result in results)
    applied = [record["applied"] for record in records(tmp_path / "run")]
    assert applied[0] and applied[-4:] == [False] * 4


def skip_one_step(process: ProcessInfo, sharded: bool) -> dict[str, Any]:
    """Three steps of which the second has a NaN gradient on data-parallel rank 0 only."""
    config = small_config()
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"sharded": sharded})})
    runner = build_runner(process, config)
    optimizer = build_optimizer(runner.model, config)
    schedule = Schedule(optimizer, config)
    stage = runner.model.module
    weights, applied = [], []
    for step in range(3):
        hook = None
        if step == 1 and runner.runtime.data_rank == 0:
            hook = stage.adapter.query.register_hook(lambda gradient: gradient * float("nan"))
        schedule.set_step(step)
        batches = share(runner, [make_batch(10 * step + i, 2, config) for i in range(2)])
        applied.append(runner.train(batches, optimizer).applied)
        weights.append([entry.data.detach().clone() for entry in model_state(stage).values()])
        if hook is not None:
            hook.remove()
    return {"applied": applied, "weights": weights}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(sharded: bool) -> None:
    for rank in run_ranks(2, skip_one_step, sharded):
        assert rank["applied"] == [True, False, True]
        first, second, third = rank["weights"]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(second, third, strict=True))
        assert all(tensor.isfinite().all() for tensor in third)


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI"))}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_qwenvl.train", *arguments],
        capture_output=True, text=True, timeout=120, env=env,
    )  # fmt: skip


def test_what_the_user_sees_of_a_bad_configuration() -> None:
    done = launch("--recipe", "tiny_stage1", "--parallel.tensor", "3", "--data.imagesize", "57")
    assert done.returncode == 2
    assert "data.image_size" in done.stderr and "parallel.tensor" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_user_sees_of_missing_data(tmp_path: Path) -> None:
    done = launch(
        "--recipe", "tiny_stage1", "--data.root", str(tmp_path / "none"), "--run_dir", str(tmp_path / "run")
    )
    assert done.returncode == 1
    assert str(tmp_path / "none") in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
