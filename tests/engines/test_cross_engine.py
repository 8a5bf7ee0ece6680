"""A checkpoint written under one tested megatron-core resumes under the other, to rounding, in both directions.

Needs an environment for each: the interpreters that ENGINE_PYTHONS names (two paths, separated by a colon), or those of
`.venv` and `.venv-3.12` beside one another in the repository.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_qwenvl.engine.versions import TESTED_BELOW_3_12, TESTED_FROM_3_12
from tests.end_to_end.training_cases import records, write_data

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
OLD, NEW = TESTED_BELOW_3_12, TESTED_FROM_3_12
HALF, ALL = 3, 6
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp2_pp2": (4, ["--parallel.tensor", "2", "--parallel.pipeline", "2", "--optimizer.sharded", "false"]),
    "dp2_sharded": (2, ["--optimizer.sharded", "true"]),
}
ROUNDING = 2e-6
"""Largest relative difference of loss and gradient norm. Two runs of one engine differ by nothing; between the engines,
and between two torch builds, sums may be formed in another order."""


def interpreters() -> dict[str, Path]:
    """The interpreter of each tested megatron-core that is there, by version."""
    named = os.environ.get("ENGINE_PYTHONS")
    paths = (
        [Path(path) for path in named.split(os.pathsep)]
        if named
        else [ROOT / folder / "bin/python" for folder in (".venv", ".venv-3.12")]
    )
    ask = "from importlib.metadata import version; print(version('megatron-core'))"
    found = {}
    for path in paths:
        if path.exists():
            asked = subprocess.run([path, "-c", ask], capture_output=True, text=True)
            found[asked.stdout.strip()] = path
    return found


PYTHONS = interpreters()


def train_runs(version: str, folder: Path, name: str, runs: list[dict[str, Any]]) -> None:
    """Train runs under an engine, in one process."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(runs))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [PYTHONS[version], "-W", "ignore", "-m", "tests.engines.train_runs", path],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().endswith(version), f"{PYTHONS[version]}: expected megatron-core {version}"


def run(folder: Path, layout: str, name: str, stop_after: int) -> dict[str, Any]:
    """An entry for `train_runs`."""
    ranks, overrides = LAYOUTS[layout]
    return {
        "data": str(folder),
        "run_dir": str(folder / layout / name),
        "stop_after": stop_after,
        "ranks": ranks,
        "overrides": overrides,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each layout a run of the old engine alone, `straight`, and for each direction one that changed engine."""
    if missing := {OLD, NEW} - PYTHONS.keys():
        pytest.skip(
            f"no environment with megatron-core {' and '.join(sorted(missing))} (ENGINE_PYTHONS names two interpreters)"
        )
    folder = tmp_path_factory.mktemp("engines")
    write_data(folder)
    first = [run(folder, layout, "forward", HALF) for layout in LAYOUTS]
    straight = [run(folder, layout, "straight", ALL) for layout in LAYOUTS]
    train_runs(OLD, folder, "old", [*straight, *first])
    forward = [run(folder, layout, "forward", ALL) for layout in LAYOUTS]
    back = [run(folder, layout, "back", HALF) for layout in LAYOUTS]
    train_runs(NEW, folder, "new", [*forward, *back])
    train_runs(OLD, folder, "old_again", [run(folder, layout, "back", ALL) for layout in LAYOUTS])
    return folder


@pytest.mark.parametrize("direction", ["forward", "back"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_goes_on_under_the_other_engine(runs: Path, layout: str, direction: str) -> None:
    engines = {"forward": [OLD, NEW], "back": [NEW, OLD]}[direction]
    run_dir = runs / layout / direction
    assert [start["megatron_core"] for start in records(run_dir, "start")] == engines
    straight, changed = records(runs / layout / "straight"), records(run_dir)
    assert [record["step"] for record in changed] == list(range(ALL))
    for expected, found in zip(straight, changed, strict=True):
        for value in ("loss", "grad_norm"):
            assert found[value] == pytest.approx(expected[value], rel=ROUNDING), (found["step"], value)
        assert found["lr"] == expected["lr"] and found["loss_tokens"] == expected["loss_tokens"]
