"""A small model, its optimizer and gradients on real ranks, for contract tests."""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.optimizer import build_optimizer
from megatron_qwenvl.training.step import StepRunner
from tests.distributed.model_cases import build_runner, make_batch, share, small_config


def optimizing_config(sharded: bool = True, clip_grad: float = 0.5) -> RunConfig:
    """A small run with layer-wise learning rates, so with many parameter groups."""
    config = small_config()
    optimizer = config.optimizer.model_copy(update={"sharded": sharded, "vit_layer_decay": 0.5, "lr": 1e-2})
    train = config.train.model_copy(update={"clip_grad": clip_grad})
    return config.model_copy(update={"optimizer": optimizer, "train": train})


def with_gradients(process: ProcessInfo, config: RunConfig) -> tuple[StepRunner, MegatronOptimizer]:
    """A model and its optimizer after one backward pass, before an update."""
    runner = build_runner(process, config)
    optimizer = build_optimizer(runner.model, config)
    optimizer.zero_grad()
    runner.accumulate(share(runner, [make_batch(i, 1 + i % 2, config) for i in range(2)]))
    return runner, optimizer
