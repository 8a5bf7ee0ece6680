"""A stop signal at any moment: exit code 75, no traceback, and the next start goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_qwenvl import train
from megatron_qwenvl.runtime.exit_codes import INTERRUPTED
from megatron_qwenvl.runtime.processes import ProcessInfo

from .stop_cases import PATIENCE, before, signal_at, start, start_ranks, wait
from .training_cases import records, run_arguments, write_data

START = (
    "config.cli:load_config",
    "runtime.logs:configure_logging",
    "engine.start:choose_device",
    "engine.start:choose_backend",
    "engine.start:_prepare_device",
    "engine.start:_join_processes",
    "engine.start:parallel_state.initialize_model_parallel",
    "training.setup:make_partition",
    "training.setup:log_run",
    "training.setup:build_stage",
    "training.setup:CheckpointManager",
    "training.setup:CheckpointManager.latest",
    "training.setup:load_initial_weights",
    "training.setup:StepRunner.build",
    "training.setup:build_optimizer",
    "training.setup:make_loaders",
    "training.setup:MetricsLog",
    "training.loop:start_record",
    "training.loop:Watchdog.start",
)
"""The phases of a start."""
STEP = (
    "data.loading.loader:StepLoader.__iter__",
    "training.loop:StepRunner.accumulate",
    "training.step:apply_gradients",
    "training.loop:step_metrics",
    "training.saving:CheckpointManager.poll",
    "training.saving:CheckpointManager.save",
    "checkpoint.run.sharded_folder:FolderSave.write",
    "checkpoint.run.checkpoints_folder:write_manifest",
    "checkpoint.run.checkpoints_folder:CheckpointsFolder._point_to",
)
"""The phases of a step and its save."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, samples=40)
    return folder


def run_of(data: Path, folder: Path, *more: str) -> list[str]:
    few = ("--train.steps", "3", "--optimizer.warmup_steps", "1", "--data.global_batch_size", "4")
    return [
        "--recipe",
        "tiny_stage2",
        *run_arguments(data, folder, *few, "--checkpoint.interval", "1", *more),
    ]


@pytest.mark.parametrize("place", [*START, *STEP])
def test_a_signal_at_any_phase(data: Path, tmp_path: Path, place: str) -> None:
    """SIGTERM with a sharded optimizer, SIGUSR1 with a whole one."""
    numbers = {"true": signal.SIGTERM, "false": signal.SIGUSR1}
    runs = {sharded: run_of(data, tmp_path / sharded, "--optimizer.sharded", sharded) for sharded in numbers}

    def codes(prepare: Callable[[int], None]) -> dict[str, int]:
        children = {
            sharded: start(
                runs[sharded],
                tmp_path / f"{sharded}.log",
                lambda number=number: prepare(number),  # type: ignore[misc]
            )
            for sharded, number in numbers.items()
        }
        return {sharded: wait(child) for sharded, child in children.items()}

    said = codes(lambda number: signal_at(place, number))
    logs = "\n".join((tmp_path / f"{sharded}.log").read_text() for sharded in numbers)
    assert said == dict.fromkeys(numbers, INTERRUPTED), logs
    assert "Traceback" not in logs and "FAILED" not in logs
    for sharded in numbers:
        left = sorted(path.name for path in (tmp_path / sharded / "checkpoints").glob("*"))
        assert (place in STEP) == ("latest" in left), left
        assert all(name == "latest" or name in ("step_00000001", "step_00000002") for name in left)
    if place in START[:-1]:
        return  # nothing is left, and the next start is a first one
    assert codes(lambda number: None) == dict.fromkeys(numbers, 0)
    for sharded in numbers:
        assert [record["step"] for record in records(tmp_path / sharded)] == [0, 1, 2]


@pytest.mark.parametrize(
    "place",
    [
        "training.setup:make_partition",
        "training.setup:CheckpointManager.latest",
        "training.loop:Watchdog.start",
        "training.step:apply_gradients",
        "checkpoint.run.sharded_folder:FolderSave.write",
    ],
)
def test_a_signal_to_one_of_two_ranks(data: Path, tmp_path: Path, place: str) -> None:
    """All ranks stop after the same step; the second start has another sharding where the layout allows it."""
    log = tmp_path / "log"
    arguments = run_of(data, tmp_path / "run", "--parallel.pipeline", "2")
    children = start_ranks(arguments, log, 2, lambda rank: signal_at(place) if rank else None)
    assert [wait(child) for child in children] == [INTERRUPTED] * 2, log.read_text()
    assert "Traceback" not in log.read_text()
    assert [wait(child) for child in start_ranks(arguments, log, 2)] == [0, 0], log.read_text()
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 1, 2]


def test_a_start_that_waits_for_a_rank_that_does_not_come(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own handlers do not run while the main thread is inside the rendezvous."""
    monkeypatch.setattr(train, "START_SECONDS", 0.2)
    log, meeting = tmp_path / "log", tmp_path / "meeting"
    alone = ProcessInfo(0, 2, 0, 2, f"file://{meeting}", "test")

    def signal_in_the_rendezvous() -> None:
        while not (meeting.exists() and meeting.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def watch() -> None:
        threading.Thread(target=signal_in_the_rendezvous, daemon=True).start()

    arguments = run_of(data, tmp_path / "run")
    child = start(arguments, log, lambda: before("engine.start:_join_processes", watch), alone)
    assert wait(child) == INTERRUPTED, log.read_text()
    assert "Traceback" not in log.read_text() and "before the first step" in log.read_text()


MOMENTS = {
    "handler, SIGTERM": ("", signal.SIGTERM),
    "handler, Ctrl-C": ("", signal.SIGINT),
    "print-config": ("", signal.SIGUSR1),
    "torch is imported": ("libtorch", signal.SIGUSR1),
    "engine": ("kernels:", signal.SIGTERM),
    "weights": ("weights: fresh", signal.SIGINT),
    "some time": ("", signal.SIGTERM),
}
"""What a real process is seen to do when the signal is sent: it has the handler, maps a library, or says something."""


def test_real_processes(data: Path, tmp_path: Path) -> None:
    """All at the same time; the last one is signalled at a random moment of its start, by its own processor time."""
    processes = {}
    for moment in MOMENTS:
        more = ("--print_config",) if moment == "print-config" else ()
        arguments = run_of(data, tmp_path / moment, *more, "--train.steps", "500")
        with (tmp_path / f"{moment}.log").open("w") as log:
            command = [sys.executable, "-W", "ignore", "-m", "megatron_qwenvl.train", *arguments]
            processes[moment] = subprocess.Popen(command, stdout=log, stderr=log)
    random_time = random.uniform(0, 8)
    waiting = dict(processes)
    while waiting:
        for moment, process in list(waiting.items()):
            sign, number = MOMENTS[moment]
            late = moment != "some time" or processor_time(process.pid) > random_time
            if process.poll() is not None or (
                late and has_come(process.pid, sign, tmp_path / f"{moment}.log")
            ):
                process.send_signal(number)
                del waiting[moment]
        time.sleep(0.01)
    for moment, process in processes.items():
        said = (tmp_path / f"{moment}.log").read_text()
        assert process.wait(PATIENCE) == INTERRUPTED, f"{moment}: {said}"
        assert "Traceback" not in said and "FAILED" not in said, f"{moment}: {said}"


def processor_time(process: int) -> float:
    """Seconds of processor time that a process has used."""
    times = psutil.Process(process).cpu_times()
    return times.user + times.system


def has_come(process: int, sign: str, log: Path) -> bool:
    """Whether a trainer has its handlers and shows the sign."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        mapped = Path(f"/proc/{process}/maps").read_text() if sign == "libtorch" else log.read_text()
    except OSError:  # it has ended
        return True
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    handled = all(caught >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGUSR1))
    return handled and sign in mapped


def test_a_finished_run_stays_finished(data: Path, tmp_path: Path) -> None:
    """A signal after the last step, and one to a run that has nothing to do, change nothing."""
    log = tmp_path / "log"
    arguments = run_of(data, tmp_path / "run")
    for place in ("engine.start:stop_engine", "training.setup:make_partition"):
        assert wait(start(arguments, log, lambda place=place: signal_at(place))) == 0, log.read_text()  # type: ignore[misc]
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 1, 2]
