"""bf16: parameters and activations are bf16; gradients, master weights and moments stay fp32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.loop import Trainer
from tests.distributed.harness import run_ranks
from tests.end_to_end.training_cases import records

from .runs import make_config, write_examples


def dtypes(process: ProcessInfo, config: RunConfig) -> dict[str, Any]:
    """Types of everything that the optimizer reads and writes, after a run."""
    trainer = Trainer.build(config, start_engine(config, process))
    trainer.run()
    parameters = list(trainer.runner.model.parameters())
    optimizer = trainer.optimizer.chained_optimizers[0].optimizer
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "parameters": {p.dtype for p in parameters},
        "gradients": {p.main_grad.dtype for p in parameters},
        "masters": {p.dtype for p in masters},
        "moments": {
            v.dtype for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)
        },
        "trained": sum(p.numel() for p in parameters),
        "mastered": sum(p.numel() for p in masters),
    }


@pytest.mark.parametrize("sharded", ["true", "false"])
def test_only_parameters_are_bf16(sharded: str, tmp_path: Path) -> None:
    write_examples("stage2", tmp_path)
    overrides = ("--train.precision", "bf16", "--optimizer.sharded", sharded)
    config = make_config("stage2", tmp_path, tmp_path / "bf16", *overrides)
    (found,) = run_ranks(1, dtypes, config)
    assert found["parameters"] == {torch.bfloat16}
    assert found["gradients"] == found["masters"] == found["moments"] == {torch.float32}
    assert found["mastered"] == found["trained"]
    losses = [step["loss"] for step in records(tmp_path / "bf16")]
    assert losses[0] == pytest.approx(math.log(config.model.decoder.vocab_size), rel=0.02)
    assert losses[-1] < losses[0] - 0.5
