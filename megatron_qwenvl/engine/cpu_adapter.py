"""Adapter that lets megatron-core run on CPU over gloo.

megatron-core names CUDA in a few places where the device does not matter to the algorithm: tensors of one
element, receive buffers, the random state that activation recomputation restores. On a CPU run `adapt_engine`
answers those places with the CPU equivalent. Nothing of the engine's logic is replaced, and nothing at all is
touched when a GPU is used. The places were read in the versions that `versions` names; it refuses others on CPU.

Relies on these places being all of them: `torch.cuda.current_device`, `synchronize`, `current_stream`, `manual_seed`
and the random state; `device="cuda"` in the constructors that the modules `clip_grads`, `optimizer`, `schedules` and
`utils` call on their global `torch`; parameters sorted by `Tensor.type()`. Held by
`tests/unit/engine/test_cpu_adapter.py`.
"""

from __future__ import annotations

import types
from typing import Any

import torch

from .replacements import Replacements

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


_ADAPTED = Replacements()
"""Replaced attributes of torch and megatron-core; one set for the process, because those are modules of the process."""


def adapt_engine() -> None:
    """Make megatron-core use the CPU in this process; idempotent."""
    if not _ADAPTED:
        _adapt_devices()
        _adapt_random_state()
        _adapt_constructors()


def restore_engine() -> None:
    """Undo `adapt_engine`: torch and megatron-core are as they were."""
    _ADAPTED.restore()


def _adapt_devices() -> None:
    _ADAPTED.replace(torch.cuda, "current_device", lambda: _CPU)
    _ADAPTED.replace(torch.cuda, "synchronize", lambda device=None: None)
    _ADAPTED.replace(torch.cuda, "current_stream", lambda device=None: None)
    original = torch.Tensor.type

    def cuda_named_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizer sorts parameters by strings such as "torch.cuda.FloatTensor".
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    _ADAPTED.replace(torch.Tensor, "type", cuda_named_type)


def _adapt_random_state() -> None:
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    _ADAPTED.replace(torch.cuda, "get_rng_state", get_state)
    _ADAPTED.replace(torch.cuda, "set_rng_state", set_state)
    _ADAPTED.replace(torch.cuda, "manual_seed", torch.manual_seed)
    _ADAPTED.replace(random, "_get_cuda_rng_state", get_state)
    _ADAPTED.replace(random, "_set_cuda_rng_state", set_state)


def _adapt_constructors() -> None:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.pipeline_parallel import schedules

    stand_in = _CpuTorch()
    for module in (clip_grads, optimizer, schedules, utils):
        _ADAPTED.replace(module, "torch", stand_in)
