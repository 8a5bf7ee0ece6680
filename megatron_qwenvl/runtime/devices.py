"""Which device this process computes on."""

from __future__ import annotations

import torch

from .processes import LaunchError


def choose_device(wanted: str, local_rank: int, launcher: str = "single") -> torch.device:
    """`auto`: CUDA where a GPU is visible, else CPU.

    A GPU is chosen by local rank, unless Slurm or MPI shows every task only its own.

    Raises:
        LaunchError: CUDA was asked for and is not there, or there are fewer GPUs than local ranks.
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
