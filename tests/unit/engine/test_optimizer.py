"""Contract: what `engine/optimizer.py` takes apart is what megatron-core's optimizer consists of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer import optimizer as core_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.engine.checkpoint_state import is_gathered
from megatron_qwenvl.engine.optimizer import (
    apply_gradients,
    initialize_moments,
    optimizer_state,
    restore_optimizer,
    set_rates,
    set_update_count,
)
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.optimizer import Schedule
from tests.distributed.harness import run_ranks

from .cases import optimizing_config, with_gradients

STEP = ["prepare_grads", "get_grad_norm", "clip_grad_by_total_norm_fp32", "step_with_ready_grads"]


def calls_of_a_step(process: ProcessInfo, config: RunConfig) -> list[str]:
    """The steps of `ChainedOptimizer.step`, in the order in which it calls them."""
    _, optimizer = with_gradients(process, config)
    assert isinstance(optimizer, ChainedOptimizer)
    called: list[str] = []

    def recorded(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return original(*args, **kwargs)

        return call

    for name in STEP:
        owner = core_optimizer if name.startswith("clip") else optimizer
        setattr(owner, name, recorded(name, getattr(owner, name)))
    optimizer.step()
    return called


def test_optimizer_step_consists_of_prepare_norm_clip_and_update() -> None:
    (called,) = run_ranks(1, calls_of_a_step, optimizing_config())
    assert called == STEP


def weights_after_a_step(process: ProcessInfo, config: RunConfig, whole: bool) -> tuple[float, list[Any]]:
    """Norm and weights after megatron-core's own step, or after the one that is taken apart."""
    runner, optimizer = with_gradients(process, config)
    norm = (
        optimizer.step()[1] if whole else apply_gradients(optimizer, config.train.clip_grad, True).grad_norm
    )
    return float(norm), [parameter.detach().clone() for parameter in runner.model.parameters()]


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "not sharded"])
def test_the_step_taken_apart_equals_the_engines_own(sharded: bool) -> None:
    config = optimizing_config(sharded)
    ranks = 2 if sharded else 1
    ours, theirs = (run_ranks(ranks, weights_after_a_step, config, whole) for whole in (False, True))
    for (norm, weights), (their_norm, their_weights) in zip(ours, theirs, strict=True):
        assert norm == their_norm > config.train.clip_grad, "the step is clipped"
        assert all(torch.equal(a, b) for a, b in zip(weights, their_weights, strict=True))


def moments_made(process: ProcessInfo, config: RunConfig) -> None:
    _, optimizer = with_gradients(process, config)
    assert isinstance(optimizer, ChainedOptimizer)
    for part in optimizer.chained_optimizers:
        part.optimizer.state.clear()
    initialize_moments(optimizer)
    states = [state for part in optimizer.chained_optimizers for state in part.optimizer.state.values()]
    assert states
    for state in states:
        assert state.keys() == {"exp_avg", "exp_avg_sq"}
        assert not any(moment.any() for moment in state.values())


def test_init_state_fn_makes_the_two_moments() -> None:
    run_ranks(1, moments_made, optimizing_config())


def restored_under_other_settings(process: ProcessInfo, config: RunConfig) -> None:
    """Load a state of 7 updates into an optimizer whose settings and multipliers are others."""
    runner, optimizer = with_gradients(process, config)
    apply_gradients(optimizer, 0.0, True)
    set_update_count(optimizer, 7)
    model = runner.model.module.sharded_state_dict()
    saved = optimizer_state(optimizer, model)
    groups = saved.get("optimizer", saved)["param_groups"]
    assert {group["step"] for group in groups} == {7}, "the count lies in every group of the state"
    changed = {"lr": 0.5, "max_lr": 0.5, "min_lr": 0.1, "weight_decay": 0.25}
    loaded_groups: list[dict[str, Any]] = []
    for part in optimizer.chained_optimizers:  # type: ignore[attr-defined]
        part.load_state_dict = lambda state: loaded_groups.extend(
            state.get("optimizer", state)["param_groups"]
        )
    set_update_count(optimizer, 0)
    for group in optimizer.param_groups:
        group.update(changed)
    restore_optimizer(optimizer, {"param_groups": [{"step": 7, "lr": 0.01} for _ in optimizer.param_groups]})
    assert len(loaded_groups) == len(optimizer.param_groups) > 4
    assert all(group["step"] == 7 for group in loaded_groups)
    assert all(group[name] == value for group in loaded_groups for name, value in changed.items())


def test_a_state_is_loaded_with_the_groups_of_today() -> None:
    run_ranks(1, restored_under_other_settings, optimizing_config())


def rates_by_step(process: ProcessInfo, config: RunConfig) -> None:
    _, optimizer = with_gradients(process, config)
    schedule = Schedule(optimizer, config)
    scheduler = schedule._scheduler
    assert isinstance(scheduler, OptimizerParamScheduler)
    forward = [set_rates(optimizer, scheduler, step) for step in (1, 5, 30)]
    groups = [group["lr"] for group in optimizer.param_groups]
    assert len(set(groups)) > 2, "the multipliers of the groups are obeyed"
    assert [set_rates(optimizer, scheduler, step) for step in (30, 5, 1)] == forward[::-1]
    assert len(set(forward)) == 3


def stored_as_gathered(process: ProcessInfo, config: RunConfig) -> bool:
    runner, optimizer = with_gradients(process, config)
    apply_gradients(optimizer, 0.0, True)
    return is_gathered(optimizer_state(optimizer, runner.model.module.sharded_state_dict()))


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "not sharded"])
def test_a_gathered_state_is_recognised(sharded: bool) -> None:
    """megatron-core names the format of a sharded optimizer's state by `param_state_sharding_type`."""
    assert run_ranks(1, stored_as_gathered, optimizing_config(sharded)) == [sharded]


def test_the_step_number_is_the_whole_state_of_the_schedule() -> None:
    run_ranks(1, rates_by_step, optimizing_config())
