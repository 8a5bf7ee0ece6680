"""Processes, devices and kernels: the only place that knows CUDA, gloo, Slurm, MPI, Transformer Engine and apex."""

from .engine import Runtime, configure_logging, start, stop
from .engine_on_cpu import EngineVersionError
from .kernels import KernelError, Kernels
from .processes import LaunchError, ProcessInfo, detect_process

__all__ = [
    "EngineVersionError",
    "KernelError",
    "Kernels",
    "LaunchError",
    "ProcessInfo",
    "Runtime",
    "configure_logging",
    "detect_process",
    "start",
    "stop",
]
