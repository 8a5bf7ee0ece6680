"""Which process this is: rank, world size and rendezvous, from torchrun, Slurm or MPI.

Every launcher leaves its own variables. Exactly one of them decides: the innermost that is set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


class LaunchError(RuntimeError):
    """The environment does not say, or contradicts itself on, which process this is."""


@dataclass(frozen=True)
class ProcessInfo:
    """Place of this process among all processes of the run."""

    rank: int
    """Global rank."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Rank on this node; selects the GPU."""
    local_world_size: int
    """Processes on this node."""
    init_method: str
    """Rendezvous for torch.distributed: `tcp://host:port`, `file://path` or `env://`."""
    launcher: str
    """Who said so: torchrun, slurm, mpi or single."""


_LAUNCHERS = {
    # launcher: rank, world size, local rank, local world size
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}


def _number(env: Mapping[str, str], name: str) -> int:
    text = env[name].split("(")[0].split(",")[0]  # SLURM_NTASKS_PER_NODE may read "2(x4)"
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name}: expected an integer, found {env[name]!r}") from None


def _read(env: Mapping[str, str], launcher: str) -> tuple[int, int, int, int] | None:
    rank, world, local_rank, local_world = _LAUNCHERS[launcher]
    if rank not in env or world not in env:
        return None
    numbers = _number(env, rank), _number(env, world)
    local = _number(env, local_rank) if local_rank in env else 0
    return *numbers, local, _number(env, local_world) if local_world in env else 1


def detect_process(env: Mapping[str, str] | None = None) -> ProcessInfo:
    """Read rank, world size and rendezvous from the environment.

    torchrun decides where its variables are set, also below a task of another launcher; then Open MPI, also below
    Slurm; then Slurm (only inside `srun`, where SLURM_STEP_ID is set: a batch script itself is one process).
    Without any of them this is a run of one process.

    Raises:
        LaunchError: on malformed numbers, a rank outside the world, or a missing rendezvous address.
    """
    env = os.environ if env is None else env
    found = {name: numbers for name in _LAUNCHERS if (numbers := _read(env, name)) is not None}
    # Open MPI starts its daemons through srun: below them Slurm's variables are the daemon's, not the rank's.
    if "slurm" in found and ("SLURM_STEP_ID" not in env or "mpi" in found):
        del found["slurm"]
    if not found:
        return ProcessInfo(0, 1, 0, 1, "", "single")
    launcher, (rank, world, local_rank, local_world) = next(iter(found.items()))
    if not 0 <= rank < world:
        raise LaunchError(f"{launcher}: expected 0 <= rank < world size, found rank {rank} of {world}")
    return ProcessInfo(rank, world, local_rank, local_world, _rendezvous(env, world, launcher), launcher)


def _rendezvous(env: Mapping[str, str], world: int, launcher: str) -> str:
    if world == 1 and "MASTER_ADDR" not in env:
        return ""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        raise LaunchError(
            f"{launcher}: {world} processes need a rendezvous but {' and '.join(missing)} is not set; "
            "start through launch/local.sh, launch/srun.sh or launch/mpirun.sh, or export it"
        )
    return f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
