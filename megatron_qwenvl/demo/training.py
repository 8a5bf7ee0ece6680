"""The demo's work: drawing the data set and training the three stages, each as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_qwenvl.runtime.listing import entries_below
from megatron_qwenvl.runtime.torchrun import local_command

STAGES = ("stage1", "stage2", "stage3")


@dataclass(frozen=True)
class DemoRun:
    """Arguments of a demo.

    Attributes:
        out, data: folders of the runs and of the data set.
        seed: of data and weights.
        tensor, pipeline, data_parallel: sizes of the parallel layout.
    """

    out: Path
    data: Path
    seed: int
    tensor: int
    pipeline: int
    data_parallel: int

    @property
    def processes(self) -> int:
        """Number of processes that train."""
        return self.tensor * self.pipeline * self.data_parallel


def start_program(name: str, *arguments: str) -> None:
    """Run a program of `megatron_qwenvl.commands` with its output on the screen."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"megatron_qwenvl.commands.{name}", *arguments],
        check=True,
    )


def heading(text: str) -> None:
    """Announce the next part of the demo."""
    print(f"\n=== {text}", flush=True)


def make_data(demo: DemoRun) -> None:
    """Draw and index the data set.

    Raises:
        subprocess.CalledProcessError: a program failed.
    """
    heading("data: images with shapes and digits, all tasks, English and Chinese")
    data = str(demo.data.resolve())
    start_program("make_demo_data", "--out", data, "--seed", str(demo.seed))
    folders = sorted({str(shard.parent) for shard in entries_below(Path(data)) if shard.suffix == ".tar"})
    start_program("index_shards", *folders)


def train_stage(demo: DemoRun, stage: str, previous: str | None) -> None:
    """Train one training stage from the weights of the one before; errors as `make_data`."""
    out = demo.out.resolve()
    start: list[str] = []
    if previous is not None:
        heading(f"transition: {previous} -> {stage}")
        weights = str(out / f"{stage}_start")
        start_program(
            "convert_checkpoint",
            "next-stage",
            "--from",
            str(out / previous),
            "--to",
            stage,
            "--out",
            weights,
        )
        start = ["--checkpoint.init_from", weights]
    processes = demo.processes
    heading(f"{stage}: {processes} processes, tensor {demo.tensor} x pipeline {demo.pipeline}")
    subprocess.run(
        local_command(
            processes, "-m", "megatron_qwenvl.train",
            "--recipe", f"tiny_{stage}",
            "--run_dir", str(out / stage),
            "--seed", str(demo.seed),
            "--data.root", str(demo.data.resolve()),
            "--parallel.tensor", str(demo.tensor),
            "--parallel.pipeline", str(demo.pipeline),
            "--parallel.sequence_parallel", str(demo.tensor > 1).lower(),
            *start,
        ),
        check=True,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
