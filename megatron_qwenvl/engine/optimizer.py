"""The steps of megatron-core's optimizer that training drives itself, and the state that it saves.

Relies on:

- `ChainedOptimizer.step` consists of `prepare_grads`, `get_grad_norm`, clipping the parameters of each chained
  optimizer by `clip_grad_by_total_norm_fp32`, and `step_with_ready_grads`. It is taken apart because an update must be
  left out where the loss or the norm is not finite, and megatron-core leaves none out in fp32 and bf16;
- `init_state_fn` of a chained optimizer makes its moments;
- the step count is the entry `step` of every parameter group, and the groups of a loaded state are in the list
  `param_groups`, found again by their settings (0.16: the multipliers, 0.19: every setting that a group can override);
- the keys of `OPTIMIZER_METADATA`;
- `OptimizerParamScheduler.num_steps` is the whole state of the schedule.

Held by `tests/unit/engine/test_optimizer.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

OPTIMIZER_METADATA: dict[str, Any] = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
"""Argument of the optimizer's `sharded_state_dict`: state laid out like the parameters, readable at any layout."""


@dataclass(frozen=True)
class Update:
    """Outcome of one optimizer step."""

    grad_norm: float
    """Global L2 norm before clipping."""
    applied: bool
    """False: the gradient or the loss was not finite and nothing was changed."""


def apply_gradients(optimizer: MegatronOptimizer, clip_grad: float, loss_is_finite: bool) -> Update:
    """Clip at the global norm and update, unless the loss or the norm is not finite.

    Loss and norm are reduced over all ranks before, so every rank decides the same.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not loss_is_finite or not math.isfinite(norm):
        return Update(norm, applied=False)
    if clip_grad > 0.0:
        assert isinstance(optimizer, ChainedOptimizer)
        for part in optimizer.chained_optimizers:
            if parameters := part.get_parameters():
                clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return Update(norm, applied=True)


def initialize_moments(optimizer: MegatronOptimizer) -> None:
    """Make the moments, zeros, which otherwise the first update makes: without them a checkpoint before that update
    would hold none, and no run could load it."""
    assert isinstance(optimizer, ChainedOptimizer)
    for part in optimizer.chained_optimizers:
        if part.optimizer is not None:
            part.init_state_fn(part.optimizer, part.config)


def optimizer_state(
    optimizer: MegatronOptimizer, model: dict[str, Any], loading: bool = False
) -> dict[str, Any]:
    """The sharded state dict of the optimizer; collective.

    Args:
        optimizer: the optimizer of this rank.
        model: sharded state dict of the model, whose tensors the moments are laid out like.
        loading: it is to be loaded into.
    """
    state: dict[str, Any] = optimizer.sharded_state_dict(
        model, is_loading=loading, metadata=dict(OPTIMIZER_METADATA)
    )
    return state


def set_update_count(optimizer: MegatronOptimizer, updates: int) -> None:
    """Set the step count of every parameter group, before a save.

    Fused optimizers do not count in groups without parameters, and the count of rank 0 is the one that is saved.
    """
    for group in optimizer.param_groups:
        group["step"] = updates


def restore_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take moments, master weights and the step count from a checkpoint; rates, decays and every other setting stay as
    they are configured now.

    megatron-core would take the settings from the checkpoint's parameter groups. All that is state in a group is the
    step count, which is the same for all; so the groups of today stand in for the saved ones, and are found.

    Args:
        optimizer: as built from the configuration.
        loaded: its sharded state dict after loading; changed.
    """
    state = loaded.get("optimizer", loaded)  # plain fp32: the groups are at the top
    saved = state["param_groups"]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if "params" in saved[0]:  # not sharded: a group says which parameters are its own, in today's order
        groups = [{**group, "params": own["params"]} for group, own in zip(groups, saved, strict=True)]
    state["param_groups"] = [{**group, "step": saved[0]["step"]} for group in groups]
    optimizer.load_state_dict(loaded)


def set_rates(optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, steps: int) -> float:
    """Set the rate of every parameter group to that after `steps` steps of a schedule, wherever it was before.

    Returns:
        The learning rate of the groups without multiplier.
    """
    scheduler.num_steps = steps
    scheduler.step(0)
    rate: float | None = get_canonical_lr_for_logging(optimizer.param_groups)
    assert rate is not None  # megatron-core gives every rank all groups, without parameters if need be
    return rate
