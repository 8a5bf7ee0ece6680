"""The progress of a run, shown by plain Python on a login node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_qwenvl.config.fields import plain
from megatron_qwenvl.config.load import dump_yaml, load_config

TOOL = Path(__file__).parents[3] / "tools/run_progress.py"


def shown(run: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Without site packages, as on a login node."""
    return subprocess.run(
        [sys.executable, "-I", "-S", TOOL, run, *options], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("written", ["config.json", "config.yaml"])
def test_the_number_of_steps_is_that_of_the_configuration(tmp_path: Path, written: str) -> None:
    hostile = "x\ntrain:\n  steps: 5\n# 'y'"
    config = load_config("tiny_stage1", ["--train.steps", "77", "--run_dir", json.dumps(hostile)])
    text = json.dumps(plain(config)) if written == "config.json" else dump_yaml(config)
    (tmp_path / written).write_text(text)
    assert shown(tmp_path).stdout == "step 0/77 | nothing saved\n"
    assert shown(tmp_path, "--finished").returncode == 1
    (tmp_path / "checkpoints/step_00000077").mkdir(parents=True)
    (tmp_path / "checkpoints/step_00000077/manifest.json").touch()
    assert shown(tmp_path, "--finished").returncode == 0


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"train": 3}', '{"train": {"steps": "x"}}'])
def test_a_damaged_configuration_is_no_number(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "config.json").write_text(damaged)
    done = shown(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "not started\n", "")
