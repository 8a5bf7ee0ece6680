"""Every command of docs/tutorial.md works, in the order of the page, on its own small data and with a few steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
FILE_NAME = re.compile(r"# ([\w.]+)\n")
STEPS = re.compile(r"\bsteps: \d+")


def write_files(page: str, folder: Path) -> list[str]:
    """Save the files that the page shows, their runs cut to 6 steps; returns the commands."""
    commands = []
    for language, text in BLOCK.findall(page):
        if language == "bash":
            commands.append(text)
        elif named := FILE_NAME.match(text):
            (folder / named[1]).write_text(STEPS.sub("steps: 6", text), encoding="utf-8")
    return commands


def test_every_command_of_the_tutorial_works(tmp_path: Path) -> None:
    for name in ("tools", "launch", "megatron_qwenvl"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = write_files((ROOT / "docs/tutorial.md").read_text(encoding="utf-8"), tmp_path)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(tmp_path),
        "PYTHONWARNINGS": "ignore",
    }
    said = ""
    for command in commands:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=tmp_path, env=environment, text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        said += done.stdout
    assert "256 samples with 256 images in 4 shards" in said
    assert "step 0: 32 samples in 1 micro-batches" in said
    assert re.search(r"^Which colour is it\?  ->  .+$", said, re.M)
    assert (tmp_path / "my_runs/exported/config.json").is_file()
