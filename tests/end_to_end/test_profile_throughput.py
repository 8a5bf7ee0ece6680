"""`tools/profile_throughput.py` through `launch/local.sh` on real shards: its table against metrics and step plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytest import approx

from megatron_qwenvl.config.load import load_config
from megatron_qwenvl.data.loading.loader import StepInfo, build_loader

from .training_cases import records, write_data

ROOT = Path(__file__).parents[2]
TENSOR, DATA, MISSING = "tensor=2 sequence_parallel=true", "data.pack_length=256", "data.root=/nowhere"
WARMUP, STEPS = 1, 3


def profile(data: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    common = [
        "--recipe", "tiny_stage2", "--out", str(out), "--warmup", str(WARMUP), "--steps", str(STEPS),
        "--data.root", str(data), "--data.sources", "[{name: mixed, path: mixed}]", "--data.workers", "0",
        "--data.validation_sources", "[]", "--data.global_batch_size", "8", "--data.pack_length", "512",
    ]  # fmt: skip
    return subprocess.run(
        [sys.executable, ROOT / "tools/profile_throughput.py", *common, *options],
        env={**os.environ, "NPROC": "2", "PYTHON": sys.executable},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def table(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two layouts that work and one that fails when it runs."""
    out = tmp_path_factory.mktemp("throughput")
    done = profile(data, out, "--layout", MISSING, "--layout", TENSOR, "--layout", DATA)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"[3/3] {DATA}\n" in done.stdout and "4 steps done\n" in done.stdout
    assert (out / "throughput.md").read_text() in done.stdout
    return json.loads((out / "throughput.json").read_text())


def row(table: dict[str, Any], layout: str) -> dict[str, Any]:
    (found,) = (row for row in table["layouts"] if row["layout"] == layout)
    return found


def step_plan(folder: Path, data_parallel: int) -> list[StepInfo]:
    """What the plan says of the measured steps."""
    loader = build_loader(load_config(str(folder / "config.yaml")), dp_size=data_parallel)
    return [loader.info(step) for step in range(WARMUP, WARMUP + STEPS)]


def test_the_header_says_what_was_measured(table: dict[str, Any]) -> None:
    assert table["recipe"] == "tiny_stage2" and "--data.global_batch_size 8" in table["overrides"]
    assert (table["processes"], table["warmup_steps"], table["measured_steps"]) == (2, WARMUP, STEPS)
    assert table["versions"].keys() == {"python", "torch", "megatron_core", "kernels"}
    assert table["hardware"].startswith("2 x CPU") and table["launcher"] == "local.sh"


@pytest.mark.parametrize(("layout", "data_parallel"), [(TENSOR, 1), (DATA, 2)])
def test_a_layouts_figures(layout: str, data_parallel: int, table: dict[str, Any]) -> None:
    found = row(table, layout)
    result, folder = found["result"], Path(found["folder"])
    steps = records(folder)
    assert [record["step"] for record in steps] == list(range(WARMUP + STEPS))
    measured, plan = steps[WARMUP:], step_plan(folder, data_parallel)
    seconds = sum(record["seconds"] for record in measured)
    assert (result["steps"], result["devices"], result["data_parallel"]) == (STEPS, 2, data_parallel)
    assert result["step_seconds"] == approx(seconds / STEPS)
    assert result["slowest_step_seconds"] == max(record["seconds"] for record in measured)
    assert result["micro_batches"] == approx(sum(info.micro_batches for info in plan) / STEPS)
    for name in ("samples", "images", "tokens"):
        expected = sum(getattr(info, name) for info in plan)
        assert result[f"{name}_per_second"] == approx(expected / seconds), name
    padded = sum(info.positions for info in plan)
    assert result["padding"] == approx(1 - sum(info.tokens for info in plan) / padded)
    flops = sum(record["flops"] for record in measured)
    assert result["tflops_per_device"] == approx(flops / seconds / 2 / 1e12)
    assert result["mfu"] is None
    assert result["peak_memory_bytes"] == max(record["peak_memory_bytes"] for record in measured)
    assert result["data_wait"] == approx(sum(r["data_wait"] * r["seconds"] for r in measured) / seconds)
    assert not list((folder / "checkpoints").glob("*")), "nothing is saved"


def test_a_layout_that_fails_is_a_row_with_its_reason(table: dict[str, Any]) -> None:
    found = row(table, MISSING)
    assert found["result"] is None
    assert found["reason"].startswith("DataError: /nowhere/mixed: ")
    assert found["reason"] in (Path(found["folder"]) / "log.txt").read_text()


def test_bad_layouts_are_refused_before_anything_starts(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = profile(data, out, "--layout", TENSOR, "--layout", "tensor=3", "--layout", "pipelin=2")
    assert done.returncode == 2
    assert "layout tensor=3: " in done.stderr and "multiple of 3 x 1 = 3, found 2" in done.stderr
    assert "parallel.pipelin: unknown key" in done.stderr and TENSOR not in done.stderr
    assert not out.exists()


def test_none_that_works_is_a_failure(data: Path, tmp_path: Path) -> None:
    launcher = tmp_path / "launcher.sh"
    launcher.write_text('#!/bin/sh\necho "$NPROC processes: no room left" >&2\nexit 3\n')
    launcher.chmod(0o755)
    done = profile(data, tmp_path / "out", "--launcher", str(launcher), "--layout", TENSOR)
    assert done.returncode == 1
    assert "2 processes: no room left" in (tmp_path / "out/throughput.md").read_text()
