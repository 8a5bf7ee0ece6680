"""The launchers start every rank with its place, its rendezvous and its arguments."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = """
import dataclasses, json, sys
from pathlib import Path
from .processes import detect_process
process = detect_process()
report = {**dataclasses.asdict(process), "arguments": sys.argv[1:]}
Path(__file__).parents[1].joinpath(f"rank-{process.rank}.json").write_text(json.dumps(report))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The launchers beside a trainer that writes down which process it is."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    package = tmp_path / "megatron_qwenvl"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text(TRAIN)
    shutil.copy(ROOT / "megatron_qwenvl/runtime/processes.py", package)
    return tmp_path


def launch(tree: Path, script: str, **environment: str) -> list[dict[str, Any]]:
    """Run a launcher with two processes and return what they wrote, by rank."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "MASTER_ADDR", "MASTER_PORT")
    }
    command = [tree / "launch" / script, "--name", "two words", "--seed=3"]
    env = {**clean, "PYTHON": sys.executable, "NPROC": "2", **environment}
    result = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return [json.loads((tree / f"rank-{rank}.json").read_text()) for rank in range(2)]


def check(reports: list[dict[str, Any]], launcher: str) -> None:
    assert [report["rank"] for report in reports] == [0, 1]
    assert [report["local_rank"] for report in reports] == [0, 1]
    for report in reports:
        assert (report["launcher"], report["world_size"], report["local_world_size"]) == (launcher, 2, 2)
        assert report["arguments"] == ["--name", "two words", "--seed=3"]
        assert report["init_method"] == reports[0]["init_method"]
        assert report["init_method"].startswith("tcp://127.0.0.1:")


def test_local(tree: Path) -> None:
    check(launch(tree, "local.sh"), "torchrun")


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_mpirun(tree: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    reports = launch(tree, "mpirun.sh", MASTER_PORT=port, **as_root)
    check(reports, "mpi")
    assert reports[0]["init_method"].endswith(port)


def test_srun_outside_an_allocation_says_what_to_do(tree: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    result = subprocess.run([tree / "launch/srun.sh"], env=clean, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "start it through salloc or sbatch" in result.stderr
