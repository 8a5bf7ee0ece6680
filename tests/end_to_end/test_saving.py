"""Saves while training goes on, saves that fail, and checkpoints that are kept."""

from __future__ import annotations

import io
import json
import logging
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_qwenvl.checkpoint.run import manager, sharded_folder
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.errors import TrainingError
from megatron_qwenvl.training.loop import Trainer
from megatron_qwenvl.training.metrics import MetricsLog
from tests.distributed.harness import run_ranks

from .training_cases import WatchdogClock, records, run_config, train, write_data


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
    trainer = Trainer.build(config, start_engine(config, process))
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    try:
        return trainer.run().step
    except CheckpointError as error:
        return str(error)


def slowly(action: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return action(*args, **kwargs)

    return slow


def train_with_slow_saves(process: ProcessInfo, config: RunConfig) -> int:
    """Gathering and, on rank 1, writing take much longer than a step may."""
    trainer = Trainer.build(config, start_engine(config, process))
    clock = WatchdogClock()

    def for_hours(action: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            clock.add(4 * 60 * config.runtime.hang_minutes)
            assert trainer.watchdog.seconds_left() > 0
            return action(*args, **kwargs)

        return slowly(slow, 0.2)

    trainer.optimizer.sharded_state_dict = for_hours(trainer.optimizer.sharded_state_dict)
    if process.rank == 1:
        sharded_folder.FolderSave.write = for_hours(sharded_folder.FolderSave.write)  # type: ignore[method-assign]
    return trainer.run().step


def test_a_slow_save_is_neither_a_hang_nor_a_lost_rank(data: Path, tmp_path: Path) -> None:
    """Its stall counts from the gathering on; that its ranks wait for each other is tested with the manager."""
    config = run_config(data, tmp_path / "run", "--train.stop_after", "2", world=2)
    assert run_ranks(2, train_with_slow_saves, config) == [2, 2]
    (save,) = records(tmp_path / "run", "save")
    assert 0.4 < save["stall"] <= save["seconds"]


def end_by_error(process: ProcessInfo, config: RunConfig, kind: type[Exception], ranks: list[int]) -> str:
    """Let `ranks` fail with an error of `kind` in the step after the save of step 3, which is still going on."""
    manager.TOGETHER_SECONDS = 2.0
    trainer = Trainer.build(config, start_engine(config, process))
    sharded_folder.FolderSave.write = slowly(sharded_folder.FolderSave.write, 1)  # type: ignore[method-assign]
    train = trainer.runner.train

    def fail(*args: Any) -> Any:
        if trainer.progress.step == 3 and process.rank in ranks:
            raise kind("as told")
        return train(*args)

    trainer.runner.train = fail  # type: ignore[assignment, method-assign]
    try:
        trainer.run()
    except kind:
        return f"{process.rank}: saved {trainer.saver.saved_step}"
    return "no error"


SAVING_ASIDE = ("--checkpoint.asynchronous", "true", "--checkpoint.interval", "3")


@pytest.mark.parametrize("kind", [TrainingError, DataError])
def test_an_error_of_all_ranks_does_not_lose_the_save_that_goes_on(
    kind: type[Exception], data: Path, tmp_path: Path
) -> None:
    config = run_config(data, tmp_path / "run", *SAVING_ASIDE, world=2)
    assert run_ranks(2, end_by_error, config, kind, [0, 1]) == ["0: saved 3", "1: saved 3"]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_00000003\n"


def test_an_error_of_one_rank_waits_for_no_other(data: Path, tmp_path: Path) -> None:
    config = run_config(data, tmp_path / "run", *SAVING_ASIDE, world=2)
    with pytest.raises(AssertionError) as error:  # the other rank is told by the end of this one
        run_ranks(2, end_by_error, config, DataError, [1], timeout=60)
    assert "by peer" in str(error.value)
    assert not (tmp_path / "run/checkpoints/latest").exists()


def log_without_room(process: ProcessInfo, config: RunConfig) -> tuple[int, str]:
    """Ten records, of which no byte of the middle ones fits on the disk; the warnings, and their text."""
    log = io.StringIO()
    logging.getLogger("megatron_qwenvl").addHandler(logging.StreamHandler(log))
    metrics = MetricsLog(config, is_rank0=True, first_step=0)
    for step in range(10):
        if step in (2, 6):
            resource.setrlimit(resource.RLIMIT_FSIZE, (250, resource.RLIM_INFINITY))
        elif step in (4, 8):
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        metrics.event("mark", step=step, text="x" * 50)
    metrics.close()
    return log.getvalue().count("metrics cannot be written"), log.getvalue()


@pytest.mark.parametrize("tensorboard", ["false", "true"])
def test_a_full_disk_costs_records_not_the_run(tensorboard: str, tmp_path: Path) -> None:
    """It is told once each time; every line that is written is whole."""
    config = run_config(tmp_path, tmp_path / "run", "--logging.tensorboard", tensorboard)
    ((warnings, text),) = run_ranks(1, log_without_room, config)
    assert warnings == 2 and "File too large" in text
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {0, 1, 4, 5, 8, 9} <= set(steps)
