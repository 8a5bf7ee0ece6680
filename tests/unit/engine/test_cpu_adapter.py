"""Contract: the places at which the CPU adapter stands in are there, and it leaves none of them changed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random

from megatron_qwenvl.engine.cpu_adapter import adapt_engine, restore_engine

MODULES = (clip_grads, optimizer, schedules, utils)
OWNERS: tuple[Any, ...] = (torch.cuda, torch.Tensor, random, *MODULES)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_module_with_cuda_literals_calls_its_global_torch(module: Any) -> None:
    assert vars(module)["torch"] is torch
    source = inspect.getsource(module)
    assert any(literal in source for literal in ("device='cuda'", 'device="cuda"')), (
        "no CUDA literal is left: the adapter need not stand in here any more"
    )


@pytest.mark.parametrize("name", ["_get_cuda_rng_state", "_set_cuda_rng_state"])
def test_the_random_state_is_read_and_set_by_these_arguments(name: str) -> None:
    original = list(inspect.signature(vars(random)[name]).parameters)
    adapt_engine()
    try:
        assert list(inspect.signature(vars(random)[name]).parameters) == original
    finally:
        restore_engine()


def test_cuda_is_answered_by_the_cpu_and_everything_is_put_back() -> None:
    before = [dict(vars(owner)) for owner in OWNERS]
    try:
        adapt_engine()
        adapt_engine()  # idempotent
        assert torch.cuda.current_device() == torch.device("cpu")
        assert optimizer.torch.tensor([1], device="cuda").device == torch.device("cpu")
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        torch.cuda.synchronize()
        assert torch.cuda.current_stream() is None
        torch.cuda.manual_seed(7)
        state = torch.cuda.get_rng_state()
        assert torch.equal(state, torch.manual_seed(7).get_state())
        drawn = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), drawn)
    finally:
        restore_engine()
    assert [dict(vars(owner)) for owner in OWNERS] == before
    assert torch.zeros(1).type() == "torch.FloatTensor"
