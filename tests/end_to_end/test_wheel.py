"""The wheel, installed outside of the repository and found by nothing else, indexes, trains and reports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from .training_cases import run_arguments, write_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the package and its console scripts, installed from a wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron_qwenvl", source / "megatron_qwenvl", ignore=ignored)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-c", build], check=True, cwd=source, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    target = ["--no-deps", "--no-index", "--target", str(folder / "installed")]
    subprocess.run([*pip, "install", *target, str(wheel)], check=True, cwd=folder)
    shutil.rmtree(source)
    return folder / "installed"


def run(installed: Path, script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [installed / "bin" / script, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_wheel_holds_what_the_programs_need(installed: Path) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {path.name for path in (installed / "bin").iterdir()} == set(scripts)
    assert (installed / "megatron_qwenvl/py.typed").is_file()
    modules = {path.relative_to(ROOT) for path in (ROOT / "megatron_qwenvl").rglob("*.py")}
    assert {path.relative_to(installed) for path in (installed / "megatron_qwenvl").rglob("*.py")} == modules


def test_it_trains_and_reports(installed: Path, tmp_path: Path) -> None:
    write_data(tmp_path, samples=20)
    index = run(installed, "qwenvl-index", "mixed", "--workers", "1", "--force", cwd=tmp_path)
    assert index.returncode == 0, index.stderr
    arguments = run_arguments(Path("."), Path("run"), "--train.steps", "2", "--optimizer.warmup_steps", "1")
    trained = run(installed, "qwenvl-train", "--recipe", "tiny_stage2", *arguments, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "finished at step 2 of 2" in trained.stderr
    progress = run(installed, "qwenvl-progress", "run", cwd=tmp_path)
    assert progress.stdout.startswith("step 2/2 | loss ")
    named = (tmp_path / "run/environment").glob("*.json")
    assert any(str(installed) in file.read_text() for file in named), "another copy of the package was used"
