"""Checkpoints of a few hand-made tensors, written by real ranks."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_qwenvl.checkpoint.run.manager import CheckpointManager
from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.config.schema import CheckpointConfig, RunConfig
from megatron_qwenvl.runtime.processes import ProcessInfo

CONFIG: RunConfig = RECIPES["tiny_stage1"]().model_copy(update={"checkpoint": CheckpointConfig(keep_last=2)})


def weights(value: float) -> torch.Tensor:
    """A full `[8, 8]` tensor with distinct entries."""
    return torch.arange(64.0).reshape(8, 8) + value


def join(process: ProcessInfo, timeout_seconds: float = 120) -> None:
    """Join the gloo process group of a test; the timeout is that of training's collectives."""
    dist.init_process_group(
        "gloo",
        init_method=process.init_method,
        rank=process.rank,
        world_size=process.world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )


def state(value: float, axis: int = 0) -> dict[str, Any]:
    """This rank's part of `weights(value)`, cut along `axis`, and a replicated bf16 vector."""
    rank, world = dist.get_rank(), dist.get_world_size()
    part = weights(value).chunk(world, axis)[rank].clone()
    return {
        "matrix": ShardedTensor.from_rank_offsets("matrix", part, (axis, rank, world)),
        "vector": ShardedTensor.from_rank_offsets(
            "vector", torch.full((3,), value, dtype=torch.bfloat16), replica_id=rank
        ),
    }


def saving(**settings: Any) -> RunConfig:
    """The run with some settings of its `checkpoint` section changed."""
    return CONFIG.model_copy(update={"checkpoint": CONFIG.checkpoint.model_copy(update=settings)})


def save_steps(process: ProcessInfo, folder: Path, steps: list[int], **options: Any) -> None:
    """Save the given steps; the value of a step's tensors is the step."""
    join(process)
    manager = CheckpointManager(folder, saving(**options))
    for step in steps:
        manager.save(step, state(step), {**state(step + 0.5), "lr": 0.1}, {"step": step})


def load_newest(process: ProcessInfo, folder: Path, axis: int = 0) -> dict[str, Any] | None:
    """What this rank gets from the newest good checkpoint, after making sure that it is the right part."""
    join(process)
    log = io.StringIO()
    logging.getLogger("megatron_qwenvl").addHandler(logging.StreamHandler(log))
    manager = CheckpointManager(folder, CONFIG)
    newest = manager.latest()
    if newest is None:
        return None
    loaded = manager.load(newest, state(0, axis), state(0, axis))
    manager.prepare()
    step = loaded.manifest.step
    part = weights(step).chunk(process.world_size, axis)[process.rank]
    assert torch.equal(loaded.model["matrix"], part)
    assert torch.equal(loaded.optimizer["matrix"], part + 0.5)
    assert torch.equal(loaded.model["vector"], torch.full((3,), step, dtype=torch.bfloat16))
    return {
        "step": step,
        "progress": loaded.manifest.progress,
        "lr": loaded.optimizer["lr"],
        "log": log.getvalue(),
    }


def failing(action: Callable[[], object]) -> str:
    """The message of the exception that `action` raises; empty if it raises none."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
