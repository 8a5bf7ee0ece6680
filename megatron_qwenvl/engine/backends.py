"""Which kernels compute GEMM layers, norms and the optimizer: Transformer Engine, apex or plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from typing import Literal

KernelName = Literal["te", "apex", "torch"]


class LayerBackendError(RuntimeError):
    """The requested kernels cannot be used here; the message says why and what to install."""


@dataclass(frozen=True)
class LayerBackend:
    """The kernels of a run."""

    name: KernelName
    """`te`: Transformer Engine layers, norms, attention and FusedAdam; `apex`: megatron-core layers with apex
    norms and FusedAdam; `torch`: megatron-core layers with torch norms and a plain AdamW."""
    reasons: tuple[str, ...] = ()
    """Reason why better kernels were passed over."""

    def describe(self) -> str:
        """One line for the log."""
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        return f"kernels: {self.name}{why}"


def _why_not_te(on_gpu: bool) -> str | None:
    if not on_gpu:
        return "Transformer Engine needs a GPU"
    try:
        import_module("transformer_engine.pytorch")
    except Exception as error:
        return f"Transformer Engine does not import ({error}); pip install 'megatron-qwenvl[gpu]'"
    return None


def _why_not_apex(on_gpu: bool) -> str | None:
    if not on_gpu:
        return "apex needs a GPU"
    if _foreign_apex():
        return "the installed package `apex` is PyPI's web toolkit, not NVIDIA apex: pip uninstall apex"
    try:
        import_module("apex.optimizers")
        import_module("apex.normalization.fused_layer_norm")
    except Exception as error:
        return (
            f"NVIDIA apex does not import ({error}); build it from github.com/NVIDIA/apex or use an NGC image"
        )
    return None


def _foreign_apex() -> bool:
    """True if the distribution named apex is the Pyramid-based toolkit of PyPI."""
    try:
        requires = distribution("apex").requires or []
    except PackageNotFoundError:
        return False
    return any(requirement.lower().startswith("pyramid") for requirement in requires)


def choose_backend(wanted: Literal["auto", "te", "apex", "torch"], on_gpu: bool) -> LayerBackend:
    """Choose the kernels once per run.

    Raises:
        LayerBackendError: a kernel other than `auto` was asked for by name and cannot be used.
    """
    if wanted == "torch":
        return LayerBackend("torch")
    obstacles: dict[KernelName, str | None] = {}
    for name, why_not in (("te", _why_not_te), ("apex", _why_not_apex)):
        if wanted not in ("auto", name):
            continue
        obstacle = why_not(on_gpu)
        if obstacle is None:
            return LayerBackend(name, tuple(reason for reason in obstacles.values() if reason))  # type: ignore[arg-type]
        obstacles[name] = obstacle  # type: ignore[index]
    if wanted != "auto":
        raise LayerBackendError(
            f"runtime.kernels: {wanted} was asked for but cannot be used: {obstacles[wanted]}"
        )
    return LayerBackend("torch", tuple(reason for reason in obstacles.values() if reason))
