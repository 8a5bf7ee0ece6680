"""Rank, world size and rendezvous of this process, as set by torchrun, Slurm or MPI.

Every launcher sets its own variables. The innermost launcher is used; nothing is guessed: missing or contradictory
numbers are an error.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


class LaunchError(RuntimeError):
    """The environment does not define rank and world size of this process, or defines them contradictorily."""


@dataclass(frozen=True)
class ProcessInfo:
    """Rank of this process in the run and on its node, with the rendezvous."""

    rank: int
    """Global rank."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Rank on this node; selects the GPU."""
    local_world_size: int
    """Processes on this node."""
    init_method: str
    """Rendezvous for torch.distributed: `tcp://host:port`, `file://path`, or empty for one process by itself."""
    launcher: str
    """Source of these values: torchrun, slurm, mpi, environment (RANK etc., exported by hand) or single."""
    node_rank: int | None = None
    """Index of this node among the run's nodes; None if the launcher does not define it."""


@dataclass(frozen=True)
class _LaunchedProcess:
    """Process as a launcher defines it, with the variables that define it."""

    process: ProcessInfo
    names: tuple[str, str, str, str]
    """Sources of rank, world size, local rank and local world size, for messages."""
    contradictions: tuple[str, ...] = ()
    """Contradictions among the launcher's own variables, one line each."""
    communicator: Any = None
    """mpi4py's COMM_WORLD if the values come from it."""


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_PMI = ("PMI_RANK", "PMI_SIZE")
_PMIX = ("PMIX_RANK",)
_COMMUNICATOR = (
    "mpi4py's rank",
    "mpi4py's world size",
    "mpi4py's rank on the node",
    "mpi4py's number of ranks on the node",
)


def detect_process(env: Mapping[str, str] | None = None, *, rendezvous: bool = True) -> ProcessInfo:
    """Read rank, world size and rendezvous from the environment.

    The innermost launcher is used: torchrun, also below a task of another launcher; Open MPI, MPICH, Intel MPI or
    prrte, also below Slurm, whose tasks are then their daemons; a Slurm step (a batch script itself is one process);
    RANK etc., exported by hand. Without any of them this is a run of one process.

    Args:
        env: the environment; default: that of this process.
        rendezvous: whether the processes need a rendezvous; `init_method` is empty otherwise.

    Raises:
        LaunchError: malformed, missing or contradictory numbers; no rendezvous address; or mpi4py is needed and
            missing.
    """
    env = os.environ if env is None else env
    address = _exported_address(env) if rendezvous else None
    launched = _find_launcher(env)
    contradictions = [
        *launched.contradictions,
        *_range_contradictions(launched),
        *_exported_contradictions(env, launched),
    ]
    if launched.communicator is not None:
        # Raise on all ranks or on none: a single rank would wait for the others in MPI's shutdown.
        contradictions = next(filter(None, launched.communicator.allgather(contradictions)), [])
    if contradictions:
        raise LaunchError("; ".join(contradictions))
    if not rendezvous or launched.process.launcher == "single":
        return launched.process
    return replace(launched.process, init_method=_rendezvous(launched, address))


def load_mpi(reason: str) -> Any:
    """Import mpi4py's `MPI` module, which initializes MPI.

    Raises:
        LaunchError: mpi4py or an MPI library for it is missing; the message starts with `reason`.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise LaunchError(f"{reason}: pip install 'megatron-qwenvl[mpi]' ({error})") from error
    except RuntimeError as error:
        raise LaunchError(f"{reason}, which finds no MPI library: {' '.join(str(error).split())}") from error
    return MPI


def _find_launcher(env: Mapping[str, str]) -> _LaunchedProcess:
    if env.get("TORCHELASTIC_RUN_ID"):
        return _from_torchrun(env, "torchrun")
    if _any_set(env, _OPEN_MPI):
        return _from_open_mpi(env)
    # MPI launchers start their daemons through srun: Slurm's variables are then those of the daemon.
    if env.get("SLURM_STEP_ID") and not _has_mpi_launcher(env):
        return _from_slurm(env)
    if _any_set(env, _PMI + _PMIX):
        return _from_mpi_library(env)
    if _any_set(env, _TORCHRUN):
        return _from_torchrun(env, "environment")
    return _LaunchedProcess(ProcessInfo(0, 1, 0, 1, "", "single"), _TORCHRUN)


def _from_torchrun(env: Mapping[str, str], launcher: str) -> _LaunchedProcess:
    rank, world, local_rank, local_world = _numbers(env, _TORCHRUN)
    node = _number(env, "GROUP_RANK") if env.get("GROUP_RANK") else None
    process = ProcessInfo(rank, world, local_rank, local_world, "", launcher, node)
    return _LaunchedProcess(process, _TORCHRUN, tuple(_node_contradictions(env, process)))


def _node_contradictions(env: Mapping[str, str], process: ProcessInfo) -> list[str]:
    """Contradictions of rank and node rank, if all nodes have the same number of processes."""
    if process.node_rank is None or not env.get("GROUP_WORLD_SIZE"):
        return []
    if _number(env, "GROUP_WORLD_SIZE") * process.local_world_size != process.world_size:
        return []
    expected_local = process.rank - process.node_rank * process.local_world_size
    # torchrun --virtual-local-rank exposes one GPU to every process, as local rank 0.
    virtual = process.local_rank == 0 and len(env.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    if expected_local == process.local_rank or (virtual and 0 <= expected_local < process.local_world_size):
        return []
    found = ", ".join(f"{name}={env[name]}" for name in ("GROUP_RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"))
    return [f"RANK={env['RANK']} contradicts {found}: expected GROUP_RANK x LOCAL_WORLD_SIZE + LOCAL_RANK"]


def _from_open_mpi(env: Mapping[str, str]) -> _LaunchedProcess:
    rank, world, local_rank, local_world = _numbers(env, _OPEN_MPI)
    return _LaunchedProcess(ProcessInfo(rank, world, local_rank, local_world, "", "mpi"), _OPEN_MPI)


def _from_slurm(env: Mapping[str, str]) -> _LaunchedProcess:
    """Read the variables of a task of a Slurm step.

    The step's own variables are used: in an interactive step the others describe the allocation, and
    SLURM_NTASKS_PER_NODE holds the requested number, not the actual one.
    """
    step = bool(env.get("SLURM_STEP_NUM_TASKS"))
    tasks = "SLURM_STEP_NUM_TASKS" if step else "SLURM_NTASKS"
    per_node = "SLURM_STEP_TASKS_PER_NODE" if step else "SLURM_TASKS_PER_NODE"
    _require_all(env, ("SLURM_STEP_ID", per_node))
    _refuse_heterogeneous_job(env)
    rank, world, local_rank, node = _numbers(env, ("SLURM_PROCID", tasks, "SLURM_LOCALID", "SLURM_NODEID"))
    counts = _tasks_per_node(env, per_node)
    if not 0 <= node < len(counts):
        raise LaunchError(f"SLURM_NODEID={node} contradicts {per_node}={env[per_node]}")
    contradictions = _contradictions(env, dict.fromkeys(("PMI_RANK", *_PMIX), ("SLURM_PROCID", rank)))
    contradictions += _contradictions(env, {"PMI_SIZE": (tasks, world)})
    if sum(counts) != world:
        contradictions.append(f"{tasks}={world} contradicts {per_node}={env[per_node]}")
    process = ProcessInfo(rank, world, local_rank, counts[node], "", "slurm", node)
    names = ("SLURM_PROCID", tasks, "SLURM_LOCALID", f"{per_node}[{node}]")
    return _LaunchedProcess(process, names, tuple(contradictions))


def _refuse_heterogeneous_job(env: Mapping[str, str]) -> None:
    """Refuse a heterogeneous job: if ranks are counted per component, the tasks of each component would take
    themselves for the whole run, at the same rendezvous.

    Raises:
        LaunchError: the job has more than one component.
    """
    components = _number(env, "SLURM_HET_SIZE") if env.get("SLURM_HET_SIZE") else 1
    if components > 1:
        raise LaunchError(
            f"SLURM_HET_SIZE={components}: expected a job of one component, found a heterogeneous one, whose "
            "tasks may be counted by component; submit it with one component or, where this step is the whole run, "
            "unset SLURM_HET_SIZE in its tasks"
        )


def _tasks_per_node(env: Mapping[str, str], name: str) -> list[int]:
    counts = expand_counts(env[name])
    if not counts:
        raise LaunchError(f"{name}: expected numbers of tasks such as 2(x3),1, found {env[name]!r}")
    return counts


def expand_counts(text: str) -> list[int]:
    """Expand Slurm's tasks per node: `2(x3),1` to 2, 2, 2, 1; empty if malformed."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _has_mpi_launcher(env: Mapping[str, str]) -> bool:
    """Return whether an MPI launcher set the PMI variables, and not Slurm's own PMI plugins.

    Hydra, the launcher of MPICH and Intel MPI, sets MPI_LOCALRANKID. Slurm's PMIx namespace is slurm.pmix.JOB.STEP.
    """
    if _has_hydra(env):
        return True
    return _any_set(env, _PMIX) and not env.get("PMIX_NAMESPACE", "slurm.pmix.").startswith("slurm.pmix.")


def _has_hydra(env: Mapping[str, str]) -> bool:
    return "MPI_LOCALRANKID" in env and _any_set(env, _PMI)


def _from_mpi_library(env: Mapping[str, str]) -> _LaunchedProcess:
    """Ask the MPI library: PMI does not define local ranks, and PMIx no sizes."""
    # A launcher below Slurm's plugin keeps the plugin's variables of the other kind, which describe its daemon.
    names: Sequence[str] = _PMI if _has_hydra(env) or not _any_set(env, _PMIX) else _PMIX
    _numbers(env, names)  # malformed or half set: an error before MPI starts
    mpi = load_mpi(f"{' and '.join(names)} come from an MPI launcher, whose ranks are asked through mpi4py")
    world = mpi.COMM_WORLD
    node = world.Split_type(mpi.COMM_TYPE_SHARED)
    first = node.bcast(world.rank)
    node_rank = sorted(set(world.allgather(first))).index(first)
    process = ProcessInfo(world.rank, world.size, node.rank, node.size, "", "mpi", node_rank)
    truth = zip(_COMMUNICATOR, (process.rank, process.world_size), strict=False)
    contradictions = _contradictions(env, dict(zip(names, truth, strict=False)))
    if contradictions:  # typically every rank is alone in its own MPI_COMM_WORLD
        contradictions[-1] += " (mpi4py may load another MPI library than the launcher's)"
    return _LaunchedProcess(process, _COMMUNICATOR, tuple(contradictions), world)


def _range_contradictions(launched: _LaunchedProcess) -> list[str]:
    process, (rank, world, local_rank, local_world) = launched.process, launched.names
    pairs = (
        (rank, process.rank, world, process.world_size),
        (local_rank, process.local_rank, local_world, process.local_world_size),
    )
    contradictions = [
        f"{name}={value} contradicts {of}={size}: expected 0 <= {value} < {size}"
        for name, value, of, size in pairs
        if not 0 <= value < size
    ]
    if process.local_world_size > process.world_size:
        contradictions.append(
            f"{local_world}={process.local_world_size} contradicts {world}={process.world_size}: more processes "
            "on this node than in all"
        )
    return contradictions


def _exported_contradictions(env: Mapping[str, str], launched: _LaunchedProcess) -> list[str]:
    """Contradictions between RANK etc., exported by hand, and the launcher's variables."""
    process = launched.process
    if process.launcher in ("torchrun", "environment", "single"):
        return []
    values = (process.rank, process.world_size, process.local_rank, process.local_world_size)
    expected = {name: (launched.names[i], values[i]) for i, name in enumerate(_TORCHRUN)}
    return [f"{contradiction} (exported by hand?)" for contradiction in _contradictions(env, expected)]


def _contradictions(env: Mapping[str, str], expected: Mapping[str, tuple[str, int]]) -> list[str]:
    """Describe each variable that differs from a second source; `expected` is {variable: (source, value)}."""
    return [
        f"{name}={env[name]} contradicts {source}={value}"
        for name, (source, value) in expected.items()
        if env.get(name) and _number(env, name) != value
    ]


def _exported_address(env: Mapping[str, str]) -> str | None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if len(missing) == 2:
        return None
    if missing:
        given = "MASTER_PORT" if missing == ["MASTER_ADDR"] else "MASTER_ADDR"
        raise LaunchError(f"{given}={env[given]} is set but {missing[0]} is not set: export both or neither")
    if not 1 <= _number(env, "MASTER_PORT") <= 65535:
        raise LaunchError(f"MASTER_PORT: expected a port in 1..65535, found {env['MASTER_PORT']!r}")
    return f"tcp://{_url_host(env['MASTER_ADDR'])}:{_number(env, 'MASTER_PORT')}"


def _url_host(address: str) -> str:
    """Format a host name or address for a URL: IPv6 addresses in brackets."""
    bare = address[1:-1] if address.startswith("[") and address.endswith("]") else address
    if ":" not in bare and bare == address:
        return address
    try:
        ipaddress.IPv6Address(bare)
    except ValueError:
        raise LaunchError(f"MASTER_ADDR: expected a host's name or address, found {address!r}") from None
    return f"[{bare}]"


def _rendezvous(launched: _LaunchedProcess, address: str | None) -> str:
    process = launched.process
    if launched.communicator is not None and process.world_size > 1:
        return _share_address(launched, address)
    if address is None and process.world_size > 1:
        raise LaunchError(
            f"{process.launcher}: {process.world_size} processes need a rendezvous but MASTER_ADDR and MASTER_PORT are "
            "not set; start through launch/local.sh, launch/srun.sh or launch/mpirun.sh, or export them"
        )
    return address or ""


def _share_address(launched: _LaunchedProcess, address: str | None) -> str:
    """Share rank 0's address with all ranks: the exported one, otherwise its host name and a free port."""
    process = launched.process
    if address is None and process.rank == 0:
        alone = process.local_world_size == process.world_size
        address = f"tcp://{'127.0.0.1' if alone else socket.gethostname()}:{_free_port()}"
    addresses: list[str | None] = launched.communicator.allgather(address)
    for rank, other in enumerate(addresses):
        if other not in (None, addresses[0]):
            raise LaunchError(
                f"MASTER_ADDR and MASTER_PORT differ: {addresses[0]} on rank 0, {other} on rank {rank}"
            )
    return str(addresses[0])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _any_set(env: Mapping[str, str], names: Sequence[str]) -> bool:
    return any(env.get(name) for name in names)


def _require_all(env: Mapping[str, str], names: Sequence[str]) -> None:
    missing = [name for name in names if not env.get(name)]
    if missing:
        given = [f"{name}={env[name]}" for name in names if env.get(name)]
        raise LaunchError(f"{', '.join(missing)} not set beside {', '.join(given) or 'its launcher'}")


def _numbers(env: Mapping[str, str], names: Sequence[str]) -> list[int]:
    _require_all(env, names)
    return [_number(env, name) for name in names]


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(f"{name}: expected an integer, found {env[name]!r}") from None
