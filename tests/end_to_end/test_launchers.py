"""The launchers, started as a user starts them: the same arguments give the same weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights

from .training_cases import records, run_arguments, write_data

ROOT = Path(__file__).parents[2]
LAYOUT = ("--parallel.tensor", "2", "--parallel.pipeline", "2", "--train.steps", "3")


def launch(script: str, run_dir: Path, data: Path) -> None:
    """Train with four ranks."""
    environment = {
        **os.environ, "NPROC": "4", "PYTHON": sys.executable,
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }  # fmt: skip
    command = [ROOT / "launch" / script, "--recipe", "tiny_stage2", *run_arguments(data, run_dir, *LAYOUT)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_mpirun_trains_what_torchrun_trains(tmp_path: Path) -> None:
    """Bit for bit; both really train."""
    write_data(tmp_path)
    runs = {script: tmp_path / script for script in ("local.sh", "mpirun.sh")}
    for script, run_dir in runs.items():
        launch(script, run_dir, tmp_path)
        assert [record["step"] for record in records(run_dir)] == [0, 1, 2]
    assert compare(*(open_weights(run_dir) for run_dir in runs.values())) == []
