"""Choice of the device that this process computes on."""

from __future__ import annotations

import torch

from .processes import LaunchError


def choose_device(wanted: str, local_rank: int, launcher: str = "single") -> torch.device:
    """Choose the device: with `auto` CUDA if a GPU is visible, otherwise the CPU.

    The local rank selects the GPU, unless Slurm or MPI exposes only one GPU to each task.

    Raises:
        LaunchError: CUDA was requested but no GPU is visible, or there are fewer GPUs than local ranks.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise LaunchError("runtime.device: cuda was asked for but no GPU is visible")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and launcher in ("slurm", "mpi"):
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise LaunchError(f"local rank {local_rank} needs a GPU of its own but this node shows {count}")
    return torch.device("cuda", local_rank)
