"""Qwen2's decoder with grouped-query attention: every layout computes what one process does, with the counted bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.model.shapes import StateBytes, state_bytes
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.optimizer import build_optimizer

from .harness import run_ranks
from .model_cases import SMALL_QWEN2, assemble, build_runner, gradients_of, make_batch, small_config
from .test_parallel_equality import assert_equal

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "tp2_pp2_sp": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
}


@cache
def one_process() -> dict[str, Any]:
    config = small_config(model=SMALL_QWEN2)
    batches = [make_batch(i, images, config) for i, images in enumerate((2, 0, 3, 1))]
    (result,) = run_ranks(1, gradients_of, config, batches)
    return {"batches": batches, "report": result["report"], "gradients": assemble(result["gradients"])}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    expected = one_process()
    config = small_config(model=SMALL_QWEN2, **parallel)
    assert_equal(run_ranks(ranks, gradients_of, config, expected["batches"]), expected)


def test_every_tensor_of_the_decoder_gets_a_gradient() -> None:
    assert all(gradient.abs().max() > 0 for gradient in one_process()["gradients"].values())


def allocated(process: ProcessInfo, config: RunConfig) -> StateBytes:
    """Bytes of the tensors that a run really holds."""
    runner = build_runner(process, config)
    parts = [part for part in build_optimizer(runner.model, config).chained_optimizers if part.optimizer]
    moments = [t for part in parts for state in part.optimizer.state.values() for t in state.values()]
    masters = [t for part in parts for group in part.shard_fp32_from_float16_groups for t in group]
    parameters = list(runner.model.parameters())
    return StateBytes(
        weights=sum(p.nbytes for p in parameters),
        gradients=sum(p.main_grad.nbytes for p in parameters if p.requires_grad),
        optimizer=sum(t.nbytes for t in [*moments, *masters]),
    )


@pytest.mark.parametrize("frozen", [(), ("vit",), ("decoder",)])
def test_a_run_holds_the_bytes_that_are_counted(frozen: tuple[str, ...]) -> None:
    config = small_config(frozen, model=SMALL_QWEN2)
    config = config.model_copy(
        update={
            "train": config.train.model_copy(update={"precision": "bf16"}),
            "optimizer": config.optimizer.model_copy(update={"sharded": True}),
        }
    )
    (found,) = run_ranks(1, allocated, config)
    assert found == state_bytes(config)
