"""Training runs for tests: a small mixed data set, a small model, and what a run leaves behind."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from megatron_qwenvl.config.load import load_config
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.records.tasks import TASKS
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.model.build import named_tensors
from megatron_qwenvl.runtime import watchdog
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.loop import Trainer
from tests.unit.data.data_cases import png_image as png
from tests.unit.data.data_cases import random_record, sample, write_source


def write_data(folder: Path, tasks: tuple[str, ...] = TASKS, samples: int = 60, name: str = "mixed") -> Path:
    """An indexed source with random records of `tasks`; images differ in colour."""
    rng = random.Random(0)

    def one(number: int) -> dict[str, Any]:
        task = tasks[number % len(tasks)]
        colour = tuple(rng.randrange(256) for _ in range(3))
        record = random_record(task, rng)
        images = (
            {}
            if task == "text" or (task == "chat" and "<img>" not in json.dumps(record))
            else {"png": png(colour=colour)}
        )
        return sample(f"{number:05d}", record, **images)

    return write_source(folder / name, [one(i) for i in range(samples)], per_shard=20)


def run_config(
    data: Path, run_dir: Path, *overrides: str, recipe: str = "tiny_stage2", world: int = 1
) -> RunConfig:
    """A small run on `data/mixed`."""
    return load_config(recipe, run_arguments(data, run_dir, *overrides), world_size=world)


def run_arguments(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    """What a small run on `data/mixed` changes in a recipe, as a command line says it."""
    return [
        "--run_dir", str(run_dir),
        "--data.root", str(data),
        "--data.sources", "[{name: mixed, path: mixed}]",
        "--data.global_batch_size", "8",
        "--data.workers", "0",
        "--data.image_size", "56",
        "--data.pack_length", "512",
        "--data.max_sample_length", "512",
        "--model.vision.layers", "2", "--model.vision.width", "32", "--model.vision.mlp_hidden", "48",
        "--model.decoder.layers", "2", "--model.decoder.hidden", "48", "--model.decoder.ffn_hidden", "64",
        "--train.steps", "10",
        "--optimizer.warmup_steps", "2",
        "--train.validation_interval", "0",
        "--checkpoint.interval", "0",
        "--logging.tensorboard", "false", "--logging.interval", "1",
        *overrides,
    ]  # fmt: skip


def train(process: ProcessInfo, config: RunConfig) -> dict[str, Any]:
    """Run a training on this rank; returns its losses, final weights and optimizer state by shard."""
    runtime = start_engine(config, process)
    trainer = Trainer.build(config, runtime)
    trainer.run()
    weights = [
        (key, shard.global_offset, shard.data.detach().clone())
        for key, shard in named_tensors(trainer.runner.model.module)
    ]
    state = [
        {name: value.clone() for name, value in moments.items() if isinstance(value, torch.Tensor)}
        for moments in trainer.optimizer.chained_optimizers[0].optimizer.state.values()
    ]
    return {"progress": trainer.progress, "weights": weights, "state": state}


def records(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The run's metric records of one kind, a later record of a step replacing an earlier one."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


class WatchdogClock:
    """The watchdog's clock in this process: real time and what a test adds to it, so that no test has to wait."""

    def __init__(self, jump: Path | None = None) -> None:
        """Install the clock; it is hours ahead from the moment on at which the file `jump` exists."""
        self._jump = jump
        self._ahead = 0.0
        watchdog.time = self  # type: ignore[attr-defined, assignment]

    def add(self, seconds: float) -> None:
        """Let time pass."""
        self._ahead += seconds

    def monotonic(self) -> float:
        jumped = 1e6 if self._jump and self._jump.exists() else 0.0
        return time.monotonic() + self._ahead + jumped

    strftime = staticmethod(time.strftime)
    sleep = staticmethod(time.sleep)
