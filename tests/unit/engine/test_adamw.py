from __future__ import annotations

import inspect

import pytest
import torch
from megatron.core import optimizer as core_optimizer
from megatron.core.optimizer import distrib_optimizer

from megatron_qwenvl.engine import adamw
from megatron_qwenvl.engine.adamw import AdamW
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks

from .cases import optimizing_config, with_gradients


def test_equals_torch_adamw_over_steps() -> None:
    """Same trajectory as torch's AdamW, with groups of different rates and decay."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(7, 5, generator=generator), torch.randn(9, generator=generator)]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))

    def groups(params: list[torch.nn.Parameter]) -> list[dict]:
        return [{"params": params[:1], "lr": 3e-2, "weight_decay": 0.1}, {"params": params[1:], "lr": 1e-2}]

    settings = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.0}
    mine, reference = AdamW(groups(ours), **settings), torch.optim.AdamW(groups(theirs), **settings)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_state_has_the_fused_layout() -> None:
    """The step is counted per group, also in an empty one; a parameter has two moments and nothing else."""
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = AdamW([{"params": [parameter]}, {"params": []}])
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
    assert optimizer.state[parameter].keys() == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("argument", [{"capturable": True}, {"adam_w_mode": False}])
def test_what_it_cannot_do_is_refused(argument: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=f"AdamW: expected {next(iter(argument))}="):
        AdamW([torch.nn.Parameter(torch.ones(1))], **argument)  # type: ignore[arg-type]


NAMES = [
    (core_optimizer, "Adam"),
    (core_optimizer, "USING_PYTORCH_OPTIMIZER"),
    (distrib_optimizer, "Adam"),
    (distrib_optimizer, "HAVE_APEX_OR_TE"),
    (distrib_optimizer, "USING_APEX_OPTIMIZER"),
]


def test_the_names_by_which_the_engine_finds_its_adam_are_there() -> None:
    for module, name in NAMES:
        assert name in vars(module), f"{module.__name__}.{name} is gone: adamw.install has no effect"
        assert name in inspect.getsource(module).replace(f"{name} =", ""), (
            f"{module.__name__} never asks for {name}"
        )


def test_uninstall_puts_everything_back() -> None:
    before = [vars(module)[name] for module, name in NAMES]
    adamw.install("torch")
    assert core_optimizer.Adam is distrib_optimizer.Adam is AdamW
    adamw.install("torch")
    adamw.uninstall()
    assert [vars(module)[name] for module, name in NAMES] == before


def built(process: ProcessInfo, sharded: bool) -> None:
    _, optimizer = with_gradients(process, optimizing_config(sharded))
    kinds = {type(part.optimizer) for part in optimizer.chained_optimizers}  # type: ignore[attr-defined]
    assert kinds == {AdamW}
    optimizer.step()
    assert {group["step"] for group in optimizer.param_groups} == {1}


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "not sharded"])
def test_the_engine_builds_this_adamw_with_arguments_that_it_knows(sharded: bool) -> None:
    run_ranks(1, built, sharded)
