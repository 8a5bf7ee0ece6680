from __future__ import annotations

import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_qwenvl.preflight.exchange import open_store
from megatron_qwenvl.runtime.processes import LaunchError, detect_process

RENDEZVOUS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
BY_HAND = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN = {**BY_HAND, "TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}
MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM = {  # as srun sets them for the last of four tasks on two nodes
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
DAEMON = {  # the task of srun that starts an MPI launcher's ranks on the second node
    **SLURM,
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
SLURM_PMI2 = {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_JOBID": "7.0"}
SLURM_PMIX = {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.7.0"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PRRTE = {"PMIX_RANK": "3", "PMIX_NAMESPACE": "prterun-node1-99@1"}


def mpi_world(rank: int, size: int) -> SimpleNamespace:
    """mpi4py as `rank` of `size` sees it, two ranks a node; rank 0 offers node9:1 to meet at."""
    first = rank - rank % 2

    def allgather(value: Any) -> list[Any]:
        if isinstance(value, int):
            return [other - other % 2 for other in range(size)]
        return ["tcp://node9:1", *[value] * (size - 1)] if value is None or "tcp" in value else [value] * size

    node = SimpleNamespace(rank=rank % 2, size=min(2, size), bcast=lambda value: first)
    world = SimpleNamespace(rank=rank, size=size, Split_type=lambda kind: node, allgather=allgather)
    return SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=world, COMM_TYPE_SHARED="shared"))


@pytest.fixture
def mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in, the last of four ranks; test_launch.py starts ranks with the real one."""
    monkeypatch.setitem(sys.modules, "mpi4py", mpi_world(3, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("launcher", "node_rank", "env"),
    [("torchrun", 1, TORCHRUN), ("environment", None, BY_HAND), ("mpi", None, MPI), ("slurm", 1, SLURM)],
)
def test_each_launcher_is_read(launcher: str, node_rank: int | None, env: dict[str, str]) -> None:
    process = detect_process({**env, **RENDEZVOUS})
    assert (process.rank, process.world_size, process.local_rank, process.local_world_size) == (3, 4, 1, 2)
    assert (process.launcher, process.node_rank) == (launcher, node_rank)
    assert process.init_method == "tcp://node1:29500"


@pytest.mark.parametrize("env", [HYDRA, PRRTE, {"PMI_RANK": "3", "PMI_SIZE": "4"}, SLURM_PMIX])
@pytest.mark.usefixtures("mpi4py")
def test_other_mpi_launchers_are_asked_through_mpi4py(env: dict[str, str]) -> None:
    process = detect_process(env)
    assert (process.rank, process.world_size, process.local_rank, process.local_world_size) == (3, 4, 1, 2)
    assert (process.launcher, process.node_rank) == ("mpi", 1)
    assert process.init_method == "tcp://node9:1"


def test_without_a_launcher_it_is_one_process() -> None:
    process = detect_process({})
    assert (process.rank, process.world_size, process.launcher, process.init_method) == (0, 1, "single", "")


def test_a_batch_script_is_not_a_task() -> None:
    """sbatch sets SLURM_PROCID and SLURM_NTASKS for the script itself; only srun sets a step."""
    env = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert detect_process(env).launcher == "single"


def test_an_interactive_step_is_one_process() -> None:
    """Its shell keeps the allocation's numbers beside its own."""
    own = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    step = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    process = detect_process({**SLURM, **own, **step})
    assert (process.rank, process.world_size, process.init_method) == (0, 1, "")


@pytest.mark.parametrize("env", [{**TORCHRUN, **DAEMON}, {**TORCHRUN, **MPI, "OMPI_COMM_WORLD_RANK": "1"}])
def test_torchrun_below_a_task_decides(env: dict[str, str]) -> None:
    assert detect_process({**env, **RENDEZVOUS}).launcher == "torchrun"


@pytest.mark.parametrize("env", [MPI, HYDRA, PRRTE, {**HYDRA, **SLURM_PMIX, "PMIX_RANK": "1"}])
@pytest.mark.usefixtures("mpi4py")
def test_mpi_ranks_below_slurm_decide(env: dict[str, str]) -> None:
    """Their daemons are tasks of srun, so Slurm's numbers are those of the daemon."""
    process = detect_process({**DAEMON, **env}, rendezvous=False)
    assert (process.launcher, process.rank, process.world_size) == ("mpi", 3, 4)


@pytest.mark.parametrize("env", [SLURM_PMI2, SLURM_PMIX])
def test_slurms_own_pmi_needs_no_mpi4py(env: dict[str, str]) -> None:
    assert detect_process({**SLURM, **env, **RENDEZVOUS}).launcher == "slurm"


@pytest.mark.parametrize(
    ("per_node", "node", "expected"),
    [("2(x2)", 1, 2), ("3,1", 0, 3), ("3,1", 1, 1), ("1(x2),2", 2, 2), ("1,3", 1, 3), ("4", 0, 4)],
)
def test_tasks_of_this_node(per_node: str, node: int, expected: int) -> None:
    """Not the number that was asked for (SLURM_NTASKS_PER_NODE), nor the first one."""
    here = {"SLURM_STEP_TASKS_PER_NODE": per_node, "SLURM_NODEID": str(node), "SLURM_LOCALID": "0"}
    assert detect_process({**SLURM, **here, **RENDEZVOUS}).local_world_size == expected


def test_exported_numbers_that_agree_are_welcome() -> None:
    assert detect_process({**SLURM, **BY_HAND, **RENDEZVOUS}).launcher == "slurm"


def test_virtual_local_ranks_of_torchrun() -> None:
    """--virtual-local-rank gives every process local rank 0 and a GPU of its own."""
    env = {**TORCHRUN, "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "GPU-5", **RENDEZVOUS}
    assert detect_process(env).local_rank == 0


def test_nodes_with_different_numbers_of_processes_under_torchrun() -> None:
    env = {**TORCHRUN, "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert detect_process({**env, **RENDEZVOUS}).rank == 2


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({**BY_HAND, "RANK": "4"}, "RANK=4 contradicts WORLD_SIZE=4"),
        ({**BY_HAND, "RANK": "-1"}, "RANK=-1 contradicts WORLD_SIZE=4"),
        ({**BY_HAND, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 contradicts LOCAL_WORLD_SIZE=2"),
        ({**BY_HAND, "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8 contradicts WORLD_SIZE=4"),
        (
            {**TORCHRUN, "LOCAL_RANK": "0"},
            "RANK=3 contradicts GROUP_RANK=1, LOCAL_WORLD_SIZE=2, LOCAL_RANK=0",
        ),
        ({**TORCHRUN, "GROUP_RANK": "0"}, "RANK=3 contradicts GROUP_RANK=0"),
        ({**SLURM, "SLURM_PROCID": "4"}, "SLURM_PROCID=4 contradicts SLURM_STEP_NUM_TASKS=4"),
        ({**SLURM, "SLURM_LOCALID": "2"}, "SLURM_LOCALID=2 contradicts SLURM_STEP_TASKS_PER_NODE[1]=2"),
        ({**SLURM, "SLURM_NODEID": "2"}, "SLURM_NODEID=2 contradicts SLURM_STEP_TASKS_PER_NODE=2(x2)"),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2,1"},
            "SLURM_STEP_NUM_TASKS=4 contradicts SLURM_STEP_TASKS_PER_NODE=2,1",
        ),
        ({**SLURM, **SLURM_PMI2, "PMI_RANK": "0"}, "PMI_RANK=0 contradicts SLURM_PROCID=3"),
        ({**SLURM, **SLURM_PMI2, "PMI_SIZE": "8"}, "PMI_SIZE=8 contradicts SLURM_STEP_NUM_TASKS=4"),
        ({**SLURM, **SLURM_PMIX, "PMIX_RANK": "0"}, "PMIX_RANK=0 contradicts SLURM_PROCID=3"),
        ({**SLURM, "RANK": "0"}, "RANK=0 contradicts SLURM_PROCID=3 (exported by hand?)"),
        ({**SLURM, "WORLD_SIZE": "8"}, "WORLD_SIZE=8 contradicts SLURM_STEP_NUM_TASKS=4"),
        ({**MPI, **BY_HAND, "RANK": "0"}, "RANK=0 contradicts OMPI_COMM_WORLD_RANK=3"),
        ({**MPI, "LOCAL_RANK": "0"}, "LOCAL_RANK=0 contradicts OMPI_COMM_WORLD_LOCAL_RANK=1"),
        ({**HYDRA, "RANK": "0"}, "RANK=0 contradicts mpi4py's rank=3"),
        ({**HYDRA, "PMI_RANK": "2"}, "PMI_RANK=2 contradicts mpi4py's rank=3"),
        (HYDRA, "MASTER_ADDR and MASTER_PORT differ: tcp://node9:1 on rank 0, tcp://node1:29500 on rank 1"),
    ],
)
@pytest.mark.usefixtures("mpi4py")
def test_a_contradiction_names_both_sides(env: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError) as refused:
        detect_process({**env, **RENDEZVOUS})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        (BY_HAND, "WORLD_SIZE"),
        (BY_HAND, "LOCAL_RANK"),
        (TORCHRUN, "LOCAL_WORLD_SIZE"),
        (MPI, "OMPI_COMM_WORLD_SIZE"),
        (MPI, "OMPI_COMM_WORLD_LOCAL_RANK"),
        (SLURM, "SLURM_PROCID"),
        (SLURM, "SLURM_LOCALID"),
        (SLURM, "SLURM_NODEID"),
        (SLURM, "SLURM_STEP_TASKS_PER_NODE"),
        (HYDRA, "PMI_SIZE"),
        (HYDRA, "PMI_RANK"),
    ],
)
def test_half_a_launcher_is_refused(env: dict[str, str], missing: str) -> None:
    env = {name: value for name, value in env.items() if name != missing}
    with pytest.raises(LaunchError, match=f"{missing} not set beside .*=") as refused:
        detect_process({**env, **RENDEZVOUS})
    assert "mpi4py" not in str(refused.value)


@pytest.mark.parametrize("tasks", ["4", "1"])
def test_a_component_of_a_heterogeneous_job_is_no_run(tasks: str) -> None:
    """The tasks of every component count from 0, so that each would be a run of its own at the same address."""
    counted = {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_TASKS_PER_NODE": tasks}
    own = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    env = {**SLURM, **counted, **own, **RENDEZVOUS, "SLURM_HET_SIZE": "2"}
    with pytest.raises(LaunchError) as refused:
        detect_process(env)
    assert "expected a job of one component" in str(refused.value) and "\n" not in str(refused.value)
    assert "unset SLURM_HET_SIZE" in str(refused.value)
    assert detect_process({**env, "SLURM_HET_SIZE": ""}).world_size == int(tasks)
    assert detect_process({**env, "SLURM_HET_SIZE": "1"}).world_size == int(tasks)


def test_an_mpi_library_that_does_not_know_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank would train alone."""
    monkeypatch.setitem(sys.modules, "mpi4py", mpi_world(0, 1))  # type: ignore[arg-type]
    with pytest.raises(
        LaunchError, match="PMI_SIZE=4 contradicts mpi4py's world size=1 .*another MPI library"
    ):
        detect_process(HYDRA)


def test_missing_mpi4py_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # type: ignore[arg-type]
    with pytest.raises(LaunchError, match=r"PMIX_RANK .* pip install 'megatron-qwenvl\[mpi\]'"):
        detect_process(PRRTE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "4 processes need a rendezvous but MASTER_ADDR and MASTER_PORT are not set"),
        ({"MASTER_ADDR": "node1"}, "MASTER_ADDR=node1 is set but MASTER_PORT is not set"),
        ({"MASTER_PORT": "29500"}, "MASTER_PORT=29500 is set but MASTER_ADDR is not set"),
        ({**RENDEZVOUS, "MASTER_PORT": "port"}, "MASTER_PORT: expected an integer, found 'port'"),
        ({**RENDEZVOUS, "MASTER_PORT": "0"}, "MASTER_PORT: expected a port in 1..65535, found '0'"),
        ({**RENDEZVOUS, "MASTER_PORT": "65536"}, "MASTER_PORT: expected a port in 1..65535, found '65536'"),
    ],
)
def test_a_bad_rendezvous_is_named(given: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError) as refused:
        detect_process({**TORCHRUN, **given})
    assert message in str(refused.value)


def test_no_rendezvous_where_none_is_wanted() -> None:
    assert detect_process({**TORCHRUN, "MASTER_ADDR": "node1"}, rendezvous=False).init_method == ""


@pytest.mark.parametrize(
    ("env", "name"),
    [({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE"), ({**SLURM, "RANK": "x"}, "RANK")]
    + [
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": text}, "SLURM_STEP_TASKS_PER_NODE")
        for text in ("2(y2)", "2,")
    ],
)
def test_nonsense_is_refused(env: dict[str, str], name: str) -> None:
    with pytest.raises(LaunchError, match=f"^{name}: expected"):
        detect_process({**env, **RENDEZVOUS})


@pytest.mark.parametrize(
    ("address", "method"),
    [
        ("::1", "tcp://[::1]:29500"),
        ("[::1]", "tcp://[::1]:29500"),
        ("fe80::1%eth0", "tcp://[fe80::1%eth0]:29500"),
        ("2001:db8::17", "tcp://[2001:db8::17]:29500"),
        ("10.0.0.1", "tcp://10.0.0.1:29500"),
        ("gpu-a-01.example.org", "tcp://gpu-a-01.example.org:29500"),
    ],
)
def test_a_rendezvous_address_of_either_internet_protocol(address: str, method: str) -> None:
    env = {**BY_HAND, "MASTER_ADDR": address, "MASTER_PORT": "29500"}
    assert detect_process(env).init_method == method


@pytest.mark.parametrize("address", ["node1:29500", "[node1]", "::1::2", "[::1"])
def test_an_address_that_is_none_is_named(address: str) -> None:
    with pytest.raises(LaunchError, match="MASTER_ADDR: expected a host's name or address, found"):
        detect_process({**BY_HAND, "MASTER_ADDR": address, "MASTER_PORT": "29500"})


def test_ranks_meet_over_the_loopback_address_of_ipv6() -> None:
    """Through the process group's rendezvous and through the store that preflight opens."""
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with socket.socket(socket.AF_INET6) as listener:
        try:
            listener.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        port = listener.getsockname()[1]
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    process = detect_process({**env, "MASTER_ADDR": "::1", "MASTER_PORT": str(port)})
    store = open_store(process, 30, host=True)
    store.set("key", "value")
    store, rank, world = next(dist.rendezvous(process.init_method.replace(str(port), "0"), 0, 1))
    store.set("key", "value")
    assert (rank, world) == (0, 1)
