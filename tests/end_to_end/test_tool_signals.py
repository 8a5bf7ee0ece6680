"""A stop signal to a tool: it ends at once with one line and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest

from megatron_qwenvl.checkpoint.convert import next_stage
from megatron_qwenvl.commands import convert_checkpoint, preflight
from megatron_qwenvl.data.shards.index import index_path
from megatron_qwenvl.runtime.exit_codes import INTERRUPTED, INTERRUPTED_BY_USER
from megatron_qwenvl.runtime.exit_process import exit_process
from megatron_qwenvl.runtime.stop_signals import exit_on_stop_signals
from megatron_qwenvl.runtime.worker_processes import start_resource_tracker
from tests.distributed.harness import run_ranks
from tests.unit.data.data_cases import sample, write_shard

from .stop_cases import before, redirect, wait
from .training_cases import run_config, train, write_data

ROOT = Path(__file__).parents[2]
CODES = {signal.SIGTERM: INTERRUPTED, signal.SIGUSR1: INTERRUPTED, signal.SIGINT: INTERRUPTED_BY_USER}


def start_tool(name: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A tool in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(ROOT / "tools" / name), *map(str, arguments)],
        env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_until(condition: object, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def write_shards(folder: Path) -> Path:
    """Two shards, of which the second takes longer to read than any test: it ends with a terabyte of holes. Gives the
    first."""
    good, endless = (
        write_shard(folder / f"00000{i}.tar", [sample("0", {"task": "text", "text": "a"})]) for i in range(2)
    )
    os.truncate(endless, 1 << 40)
    return good


@pytest.mark.parametrize(
    ("workers", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1), (2, signal.SIGINT)]
)
def test_indexing(tmp_path: Path, workers: int, number: signal.Signals) -> None:
    """The signal comes to every process, as from Slurm and from a terminal."""
    good = write_shards(tmp_path / "data")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    tool = start_tool("index_shards.py", tmp_path / "data", "--workers", workers, TMPDIR=str(temporary))
    wait_until(lambda: index_path(good).exists())
    processes = [psutil.Process(tool.pid), *psutil.Process(tool.pid).children(recursive=True)]
    os.killpg(tool.pid, number)
    said, _ = tool.communicate(timeout=60)
    assert tool.returncode == CODES[number], said
    assert said.splitlines()[-1] == f"index_shards: interrupted by {number.name}" and "Traceback" not in said
    assert psutil.wait_procs(processes, timeout=60)[1] == []
    left = {path.name for path in (tmp_path / "data").iterdir()}
    assert left == {"000000.tar", "000001.tar", index_path(good).name} and list(temporary.iterdir()) == []


def test_workers_of_a_killed_indexer_end(tmp_path: Path) -> None:
    good = write_shards(tmp_path / "data")
    tool = start_tool("index_shards.py", tmp_path / "data", "--workers", 2)
    wait_until(lambda: index_path(good).exists())
    workers = psutil.Process(tool.pid).children(recursive=True)
    tool.kill()
    tool.communicate(timeout=60)
    assert len(workers) >= 3  # resource tracker, two workers
    assert psutil.wait_procs(workers, timeout=60)[1] == []


@pytest.mark.parametrize("number", CODES)
def test_conversion(checkpoint: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The signal comes to every process while the workers' disk hangs."""

    def hang(*_: object) -> None:
        os.killpg(0, number)
        time.sleep(600)

    def convert() -> int:
        next_stage.copy_file = hang  # type: ignore[assignment]
        sys.argv = [
            "convert_checkpoint.py",
            "next-stage",
            "--from",
            str(checkpoint),
            "--to",
            "stage3",
            "--out",
        ]
        sys.argv += [str(tmp_path / "start"), "--force"]
        return convert_checkpoint.main()

    code, said = in_a_fork(convert, tmp_path / "log")
    assert code == CODES[number], said
    assert said.splitlines()[-1] == f"tool: interrupted by {number.name}" and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder, samples=20)
    run_ranks(1, train, run_config(folder, folder / "run", "--train.stop_after", "1"))
    return folder / "run"


@pytest.mark.parametrize("number", CODES)
def test_preflight(tmp_path: Path, number: signal.Signals) -> None:
    """The signal comes while this rank's file lies in the run directory."""

    def check() -> int:
        before("preflight.run:_Preflight._check_shared_files", lambda: os.kill(os.getpid(), number))
        return preflight.main(["--directory", str(tmp_path / "run")])

    code, said = in_a_fork(check, tmp_path / "log")
    assert code == CODES[number], said
    assert "Traceback" not in said and "tool: interrupted by" in said
    assert list((tmp_path / "run").iterdir()) == []


def in_a_fork(main: Callable[[], int], log: Path) -> tuple[int, str]:
    """Exit code and output of a tool's program in a fork of this process, with the handlers that it has by itself."""
    child = os.fork()
    if not child:
        try:
            os.setsid()
            redirect(log)
            exit_on_stop_signals("tool")
            code = main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 99
        exit_process(code)
    return wait(child), log.read_text()


def test_the_resource_tracker_outlives_stop_signals() -> None:
    start_resource_tracker()
    tracker = resource_tracker._resource_tracker
    for number in CODES:
        os.kill(tracker._pid, number)  # type: ignore[attr-defined]
    time.sleep(0.5)
    assert psutil.Process(tracker._pid).status() != psutil.STATUS_ZOMBIE  # type: ignore[attr-defined]
