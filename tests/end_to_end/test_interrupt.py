"""A run that is asked to stop, or that hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights
from megatron_qwenvl.config.load import dump_yaml
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.runtime.exit_codes import INTERRUPTED
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.loop import Trainer
from tests.distributed.harness import run_ranks

from .stop_cases import PATIENCE
from .training_cases import WatchdogClock, records, run_config, train, write_data

ROOT = Path(__file__).parents[2]


def start(config: RunConfig, log: Path) -> subprocess.Popen[bytes]:
    """The run in two processes by the launcher."""
    recipe = log.with_suffix(".yaml")
    recipe.write_text(dump_yaml(config))
    temporary = log.with_suffix(".tmp")
    temporary.mkdir(exist_ok=True)
    env = {
        **os.environ,
        "NPROC": "2",
        "PYTHON": sys.executable,
        "PYTHONWARNINGS": "ignore",
        "TMPDIR": str(temporary),
    }
    with log.open("ab") as output:
        command = [ROOT / "launch/local.sh", "--recipe", recipe]
        return subprocess.Popen(command, env=env, stdout=output, stderr=output)


def wait_until(launcher: subprocess.Popen[bytes], log: Path, has_come: Callable[[], bool]) -> None:
    """Wait for something that a run does."""
    while not has_come():
        assert launcher.poll() is None, log.read_text()
        time.sleep(0.02)


def has_trained(run_dir: Path, steps: int) -> bool:
    return (run_dir / "metrics.jsonl").is_file() and len(records(run_dir)) >= steps


def signal_all(launcher: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """What Slurm does: the signal goes to every process of the job, loader workers included."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            process.send_signal(number)


def test_a_signal_saves_and_the_next_start_goes_on_exactly(tmp_path: Path) -> None:
    """The second signal comes while the first one's save may be going on. Nothing temporary remains."""
    write_data(tmp_path)
    config = run_config(tmp_path, tmp_path / "run", "--train.steps", "60", "--data.workers", "1", world=2)
    log = tmp_path / "log"
    first = start(config, log)
    wait_until(first, log, lambda: has_trained(tmp_path / "run", 3))
    signal_all(first, signal.SIGTERM)
    wait_until(first, log, lambda: "asked to stop (SIGTERM): saving" in log.read_text())
    signal_all(first, signal.SIGTERM)
    assert first.wait(PATIENCE) == INTERRUPTED, log.read_text()
    (saved,) = records(tmp_path / "run", "save")
    steps = [record["step"] for record in records(tmp_path / "run")]
    assert 3 <= saved["step"] < 60 and steps == list(range(saved["step"]))

    assert list((tmp_path / "log.tmp").iterdir()) == []
    assert start(config, log).wait(PATIENCE) == 0, log.read_text()
    assert list((tmp_path / "log.tmp").iterdir()) == []
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(60))
    straight = run_config(tmp_path, tmp_path / "straight", "--train.steps", "60", world=2)
    run_ranks(2, train, straight)
    assert compare(open_weights(tmp_path / "run"), open_weights(tmp_path / "straight")) == []


def hang(process: ProcessInfo, config: RunConfig, folder: Path) -> None:
    """Rank 1 gets stuck in its first step while rank 0 waits for it; then an hour passes on both."""
    trainer = Trainer.build(config, start_engine(config, process))
    WatchdogClock(jump=folder / "later")
    train_step = trainer.runner.train

    def train_and_tell(*arguments: Any) -> Any:
        (folder / "rank 0 trains").touch()
        return train_step(*arguments)

    def get_stuck(*_: Any) -> None:
        while not (folder / "rank 0 trains").exists():
            time.sleep(0.01)
        (folder / "later").touch()
        time.sleep(600)

    trainer.runner.train = get_stuck if process.rank == 1 else train_and_tell  # type: ignore[method-assign, assignment]
    trainer.run()


def test_a_hang_ends_the_run_with_the_stacks_of_every_rank(tmp_path: Path) -> None:
    write_data(tmp_path)
    config = run_config(tmp_path, tmp_path / "run", world=2)
    with pytest.raises(AssertionError, match="killed because another rank failed"):
        run_ranks(2, hang, config, tmp_path)
    stacks = {path.name[:10]: path.read_text() for path in (tmp_path / "run" / "stacks").iterdir()}
    assert stacks.keys() == {"rank_00000", "rank_00001"}
    assert "in get_stuck" in stacks["rank_00001"]
    assert "in train_and_tell" in stacks["rank_00000"] and "in get_stuck" not in stacks["rank_00000"]


def test_a_slow_run_that_makes_steps_is_no_hang(tmp_path: Path) -> None:
    write_data(tmp_path)
    config = run_config(tmp_path, tmp_path / "run", "--train.steps", "6")
    run_ranks(1, train_slowly, config)
    assert len(records(tmp_path / "run")) == 6


def train_slowly(process: ProcessInfo, config: RunConfig) -> None:
    """Every step takes most of the time that is allowed without a sign of life."""
    trainer = Trainer.build(config, start_engine(config, process))
    clock, train_step = WatchdogClock(), trainer.runner.train

    def slow(*arguments: Any) -> Any:
        clock.add(0.9 * 60 * config.runtime.hang_minutes)
        assert trainer.watchdog.seconds_left() > 0
        return train_step(*arguments)

    trainer.runner.train = slow  # type: ignore[method-assign]
    trainer.run()
