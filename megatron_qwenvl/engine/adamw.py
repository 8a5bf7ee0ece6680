"""AdamW with the state layout of the fused optimizers of Transformer Engine and apex, in plain torch.

megatron-core's distributed optimizer checkpoints the layout of FusedAdam: the step count lives in the parameter
group (also of a group without parameters) and a parameter's state is exactly `exp_avg` and `exp_avg_sq`.
torch's own AdamW keeps the step per parameter and cannot be loaded by it.

Relies on the names by which megatron-core finds its Adam and asks for the layout of its state (see `install`), and on
the arguments that it gives it. Held by `tests/unit/engine/test_adamw.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from .replacements import Replacements


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay Adam (Loshchilov & Hutter, arXiv 1711.05101) with bias correction.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        adam_w_mode: must be True; the argument exists for FusedAdam's signature.
        capturable: must be False; likewise.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("AdamW: expected capturable=False, found True (CUDA graphs are not supported)")
        if not adam_w_mode:
            raise ValueError(
                "AdamW: expected adam_w_mode=True, found False (L2 regularisation is not supported)"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; counts the step in every group."""
        if closure is not None:
            raise ValueError("AdamW.step: closures are not supported")
        for group in self.param_groups:
            group["step"] += 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in params if p.grad is not None]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta2 ** group["step"]) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, first, denominator, -group["lr"] / (1 - beta1 ** group["step"]))


_INSTALLED = Replacements()


def install(kernels: Literal["apex", "torch"]) -> None:
    """Make megatron-core build this AdamW, or apex's fused one, in this process, until `uninstall`.

    By itself it takes Transformer Engine's where that imports, and torch's where nothing else does.
    """
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    adam = import_module("apex.optimizers").FusedAdam if kernels == "apex" else AdamW
    _INSTALLED.replace(optimizers, "Adam", adam)
    _INSTALLED.replace(optimizers, "USING_PYTORCH_OPTIMIZER", False)
    _INSTALLED.replace(distrib_optimizer, "Adam", adam)
    _INSTALLED.replace(distrib_optimizer, "HAVE_APEX_OR_TE", True)  # "its state has the fused layout"
    _INSTALLED.replace(distrib_optimizer, "USING_APEX_OPTIMIZER", True)


def uninstall() -> None:
    """Let megatron-core choose its Adam again."""
    _INSTALLED.restore()
