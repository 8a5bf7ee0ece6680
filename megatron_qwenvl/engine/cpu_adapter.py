"""Adapter that lets megatron-core run on CPU over gloo.

megatron-core names CUDA in a few places where the device does not matter to the algorithm: tensors of one
element, receive buffers, the random state that activation recomputation restores. On a CPU run `adapt_engine`
answers those places with the CPU equivalent. Nothing of the engine's logic is replaced, and nothing at all is
touched when a GPU is used. The places were read in the versions that `versions` names; it refuses others on CPU.
"""

from __future__ import annotations

import types
from typing import Any

import torch

_CPU = torch.device("cpu")


class _CpuTorch(types.ModuleType):
    """`torch` with tensor constructors that place `device='cuda'` on the CPU."""

    _CONSTRUCTORS = ("zeros", "ones", "empty", "full", "tensor")

    def __init__(self) -> None:
        super().__init__("torch")
        for name in self._CONSTRUCTORS:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(constructor: Any) -> Any:
    def construct(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        on = _CPU if str(device).startswith("cuda") else device
        tensor: torch.Tensor = constructor(*args, device=on, **kwargs)
        return tensor

    return construct


def adapt_engine() -> None:
    """Make megatron-core use the CPU in this process; idempotent."""
    if getattr(torch.cuda.current_device, "on_cpu", False):
        return
    _adapt_devices()
    _adapt_random_state()
    _adapt_constructors()


def _current_device() -> torch.device:
    return _CPU


_current_device.on_cpu = True  # type: ignore[attr-defined]


def _adapt_devices() -> None:
    torch.cuda.current_device = _current_device  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment,return-value]
    original = torch.Tensor.type

    def cuda_named_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizer sorts parameters by strings such as "torch.cuda.FloatTensor".
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = cuda_named_type  # type: ignore[assignment,method-assign]


def _adapt_random_state() -> None:
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    torch.cuda.get_rng_state = get_state
    torch.cuda.set_rng_state = set_state
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


def _adapt_constructors() -> None:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.pipeline_parallel import schedules

    stand_in = _CpuTorch()
    for module in (clip_grads, optimizer, schedules, utils):
        module.torch = stand_in
