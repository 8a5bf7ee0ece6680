"""Which process this is: rank, world size and rendezvous, from torchrun, Slurm or MPI.

Every launcher leaves its own variables. The innermost launcher decides; nothing is guessed: numbers that are missing
or that contradict each other are an error.
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
    """Rendezvous for torch.distributed: `tcp://host:port`, `file://path`, or empty for one process by itself."""
    launcher: str
    """Who said so: torchrun, slurm, mpi, environment (RANK and its like, exported by hand) or single."""
    node_rank: int | None = None
    """Number of this node among the run's nodes; None where the launcher does not say."""


@dataclass(frozen=True)
class _Place:
    """What a launcher says, and the names it says it by."""

    process: ProcessInfo
    names: tuple[str, str, str, str]
    """Where rank, world size, local rank and local world size come from."""
    complaints: tuple[str, ...] = ()
    """What contradicts it among the launcher's own variables."""
    communicator: Any = None
    """mpi4py's COMM_WORLD where it was asked."""


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

    The innermost launcher decides: torchrun, also below a task of another launcher; Open MPI, MPICH, Intel MPI or
    prrte, also below Slurm, whose tasks are then their daemons; a Slurm step (a batch script itself is one process);
    RANK and its like, exported by hand. Without any of them this is a run of one process.

    Args:
        env: the environment; left out, this process's.
        rendezvous: whether the processes are to meet; `init_method` is empty otherwise.

    Raises:
        LaunchError: on malformed or missing numbers, on numbers that contradict each other, on a missing rendezvous
            address, and where MPI must be asked and mpi4py is missing.
    """
    env = os.environ if env is None else env
    address = _given_address(env) if rendezvous else None
    place = _find_place(env)
    complaints = [*place.complaints, *_out_of_range(place), *_against_exported(env, place)]
    if place.communicator is not None:
        # On all ranks or on none: one that leaves alone would wait for the others in MPI's shutdown.
        complaints = next(filter(None, place.communicator.allgather(complaints)), [])
    if complaints:
        raise LaunchError("; ".join(complaints))
    if not rendezvous or place.process.launcher == "single":
        return place.process
    return replace(place.process, init_method=_rendezvous(place, address))


def load_mpi(reason: str) -> Any:
    """mpi4py's `MPI` module; importing it starts MPI.

    Raises:
        LaunchError: mpi4py or an MPI library for it is missing; `reason` says what needs it.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise LaunchError(f"{reason}: pip install 'megatron-qwenvl[mpi]' ({error})") from error
    except RuntimeError as error:
        raise LaunchError(f"{reason}, which finds no MPI library: {' '.join(str(error).split())}") from error
    return MPI


def _find_place(env: Mapping[str, str]) -> _Place:
    if env.get("TORCHELASTIC_RUN_ID"):
        return _torchrun(env, "torchrun")
    if _any(env, _OPEN_MPI):
        return _open_mpi(env)
    # Other MPI launchers start their daemons through srun, as Open MPI does: Slurm's variables are then the daemon's.
    if env.get("SLURM_STEP_ID") and not _below_own_launcher(env):
        return _slurm(env)
    if _any(env, _PMI + _PMIX):
        return _ask_mpi(env)
    if _any(env, _TORCHRUN):
        return _torchrun(env, "environment")
    return _Place(ProcessInfo(0, 1, 0, 1, "", "single"), _TORCHRUN)


def _torchrun(env: Mapping[str, str], launcher: str) -> _Place:
    rank, world, local_rank, local_world = _numbers(env, _TORCHRUN)
    node = _number(env, "GROUP_RANK") if env.get("GROUP_RANK") else None
    process = ProcessInfo(rank, world, local_rank, local_world, "", launcher, node)
    return _Place(process, _TORCHRUN, tuple(_outside_group(env, process)))


def _outside_group(env: Mapping[str, str], process: ProcessInfo) -> list[str]:
    """Complains of a rank that is not among its node's, where all nodes have as many processes."""
    if process.node_rank is None or not env.get("GROUP_WORLD_SIZE"):
        return []
    if _number(env, "GROUP_WORLD_SIZE") * process.local_world_size != process.world_size:
        return []
    place = process.rank - process.node_rank * process.local_world_size
    # torchrun --virtual-local-rank shows every process one GPU, under local rank 0.
    virtual = process.local_rank == 0 and len(env.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    if place == process.local_rank or (virtual and 0 <= place < process.local_world_size):
        return []
    found = ", ".join(f"{name}={env[name]}" for name in ("GROUP_RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"))
    return [f"RANK={env['RANK']} contradicts {found}: expected GROUP_RANK x LOCAL_WORLD_SIZE + LOCAL_RANK"]


def _open_mpi(env: Mapping[str, str]) -> _Place:
    rank, world, local_rank, local_world = _numbers(env, _OPEN_MPI)
    return _Place(ProcessInfo(rank, world, local_rank, local_world, "", "mpi"), _OPEN_MPI)


def _slurm(env: Mapping[str, str]) -> _Place:
    """A task of a step.

    The step's own variables are read: in an interactive step the others are the allocation's, and
    SLURM_NTASKS_PER_NODE is what was asked for, not what was given.
    """
    step = bool(env.get("SLURM_STEP_NUM_TASKS"))
    tasks = "SLURM_STEP_NUM_TASKS" if step else "SLURM_NTASKS"
    per_node = "SLURM_STEP_TASKS_PER_NODE" if step else "SLURM_TASKS_PER_NODE"
    _all_or_error(env, ("SLURM_STEP_ID", per_node))
    _refuse_component(env)
    rank, world, local_rank, node = _numbers(env, ("SLURM_PROCID", tasks, "SLURM_LOCALID", "SLURM_NODEID"))
    counts = _tasks_per_node(env, per_node)
    if not 0 <= node < len(counts):
        raise LaunchError(f"SLURM_NODEID={node} contradicts {per_node}={env[per_node]}")
    complaints = _against(env, dict.fromkeys(("PMI_RANK", *_PMIX), ("SLURM_PROCID", rank)))
    complaints += _against(env, {"PMI_SIZE": (tasks, world)})
    if sum(counts) != world:
        complaints.append(f"{tasks}={world} contradicts {per_node}={env[per_node]}")
    process = ProcessInfo(rank, world, local_rank, counts[node], "", "slurm", node)
    names = ("SLURM_PROCID", tasks, "SLURM_LOCALID", f"{per_node}[{node}]")
    return _Place(process, names, tuple(complaints))


def _refuse_component(env: Mapping[str, str]) -> None:
    """Refuse a task of a heterogeneous job: where a step's numbers are those of one component, the tasks of each would
    take themselves for the whole run, and meet at one rendezvous.

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
    """Tasks of every node: `2(x3),1` is 2, 2, 2 and 1; empty for anything else."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _below_own_launcher(env: Mapping[str, str]) -> bool:
    """Whether an MPI launcher set PMI's numbers, which differ from Slurm's; Slurm's own plugins for PMI set the same.

    Hydra, the launcher of MPICH and Intel MPI, says MPI_LOCALRANKID. PMIx names who set its rank; Slurm's name is
    slurm.pmix.JOB.STEP.
    """
    if _hydra(env):
        return True
    return _any(env, _PMIX) and not env.get("PMIX_NAMESPACE", "slurm.pmix.").startswith("slurm.pmix.")


def _hydra(env: Mapping[str, str]) -> bool:
    return "MPI_LOCALRANKID" in env and _any(env, _PMI)


def _ask_mpi(env: Mapping[str, str]) -> _Place:
    """PMI has no numbers for a node, and PMIx no size: the MPI library knows them."""
    # A launcher below Slurm's plugin leaves the plugin's variables of the other kind as they are: the daemon's.
    said: Sequence[str] = _PMI if _hydra(env) or not _any(env, _PMIX) else _PMIX
    _numbers(env, said)  # malformed or half set: an error before MPI starts
    mpi = load_mpi(f"{' and '.join(said)} come from an MPI launcher, whose ranks are asked through mpi4py")
    world = mpi.COMM_WORLD
    node = world.Split_type(mpi.COMM_TYPE_SHARED)
    first = node.bcast(world.rank)
    node_rank = sorted(set(world.allgather(first))).index(first)
    process = ProcessInfo(world.rank, world.size, node.rank, node.size, "", "mpi", node_rank)
    truth = zip(_COMMUNICATOR, (process.rank, process.world_size), strict=False)
    complaints = _against(env, dict(zip(said, truth, strict=False)))
    if complaints:  # typically every rank is alone in a world of its own
        complaints[-1] += " (mpi4py may load another MPI library than the launcher's)"
    return _Place(process, _COMMUNICATOR, tuple(complaints), world)


def _out_of_range(place: _Place) -> list[str]:
    process, (rank, world, local_rank, local_world) = place.process, place.names
    pairs = (
        (rank, process.rank, world, process.world_size),
        (local_rank, process.local_rank, local_world, process.local_world_size),
    )
    complaints = [
        f"{name}={value} contradicts {of}={size}: expected 0 <= {value} < {size}"
        for name, value, of, size in pairs
        if not 0 <= value < size
    ]
    if process.local_world_size > process.world_size:
        complaints.append(
            f"{local_world}={process.local_world_size} contradicts {world}={process.world_size}: more processes "
            "on this node than in all"
        )
    return complaints


def _against_exported(env: Mapping[str, str], place: _Place) -> list[str]:
    """Complains of RANK and its like where they were exported by hand and the launcher says otherwise."""
    process = place.process
    if process.launcher in ("torchrun", "environment", "single"):
        return []
    values = (process.rank, process.world_size, process.local_rank, process.local_world_size)
    expected = {name: (place.names[i], values[i]) for i, name in enumerate(_TORCHRUN)}
    return [f"{complaint} (exported by hand?)" for complaint in _against(env, expected)]


def _against(env: Mapping[str, str], expected: Mapping[str, tuple[str, int]]) -> list[str]:
    """Complains of each variable that is set to another value than a second source has: {variable: (source, value)}."""
    return [
        f"{name}={env[name]} contradicts {source}={value}"
        for name, (source, value) in expected.items()
        if env.get(name) and _number(env, name) != value
    ]


def _given_address(env: Mapping[str, str]) -> str | None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if len(missing) == 2:
        return None
    if missing:
        given = "MASTER_PORT" if missing == ["MASTER_ADDR"] else "MASTER_ADDR"
        raise LaunchError(f"{given}={env[given]} is set but {missing[0]} is not set: export both or neither")
    if not 1 <= _number(env, "MASTER_PORT") <= 65535:
        raise LaunchError(f"MASTER_PORT: expected a port in 1..65535, found {env['MASTER_PORT']!r}")
    return f"tcp://{_host_of_url(env['MASTER_ADDR'])}:{_number(env, 'MASTER_PORT')}"


def _host_of_url(address: str) -> str:
    """A host's name or address as a URL holds it: IPv6 addresses, whose colons would end it, in brackets."""
    bare = address[1:-1] if address.startswith("[") and address.endswith("]") else address
    if ":" not in bare and bare == address:
        return address
    try:
        ipaddress.IPv6Address(bare)
    except ValueError:
        raise LaunchError(f"MASTER_ADDR: expected a host's name or address, found {address!r}") from None
    return f"[{bare}]"


def _rendezvous(place: _Place, address: str | None) -> str:
    process = place.process
    if place.communicator is not None and process.world_size > 1:
        return _agree_on_address(place, address)
    if address is None and process.world_size > 1:
        raise LaunchError(
            f"{process.launcher}: {process.world_size} processes need a rendezvous but MASTER_ADDR and MASTER_PORT are "
            "not set; start through launch/local.sh, launch/srun.sh or launch/mpirun.sh, or export them"
        )
    return address or ""


def _agree_on_address(place: _Place, address: str | None) -> str:
    """Rank 0's address on all ranks: the exported one, else its host and a free port."""
    process = place.process
    if address is None and process.rank == 0:
        alone = process.local_world_size == process.world_size
        address = f"tcp://{'127.0.0.1' if alone else socket.gethostname()}:{_free_port()}"
    addresses: list[str | None] = place.communicator.allgather(address)
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


def _any(env: Mapping[str, str], names: Sequence[str]) -> bool:
    return any(env.get(name) for name in names)


def _all_or_error(env: Mapping[str, str], names: Sequence[str]) -> None:
    missing = [name for name in names if not env.get(name)]
    if missing:
        given = [f"{name}={env[name]}" for name in names if env.get(name)]
        raise LaunchError(f"{', '.join(missing)} not set beside {', '.join(given) or 'its launcher'}")


def _numbers(env: Mapping[str, str], names: Sequence[str]) -> list[int]:
    _all_or_error(env, names)
    return [_number(env, name) for name in names]


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(f"{name}: expected an integer, found {env[name]!r}") from None
