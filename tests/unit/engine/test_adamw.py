from __future__ import annotations

import pytest
import torch

from megatron_qwenvl.engine.adamw import AdamW


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
