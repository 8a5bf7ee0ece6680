from __future__ import annotations

import pytest

from megatron_qwenvl.runtime.processes import LaunchError, detect_process

RENDEZVOUS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_ID": "0",
}


@pytest.mark.parametrize(("launcher", "env"), [("torchrun", TORCHRUN), ("mpi", MPI), ("slurm", SLURM)])
def test_each_launcher_is_read(launcher: str, env: dict[str, str]) -> None:
    process = detect_process({**env, **RENDEZVOUS})
    assert (process.rank, process.world_size, process.local_rank, process.local_world_size) == (3, 4, 1, 2)
    assert process.launcher == launcher
    assert process.init_method == "tcp://node1:29500"


def test_without_a_launcher_it_is_one_process() -> None:
    process = detect_process({})
    assert (process.rank, process.world_size, process.launcher, process.init_method) == (0, 1, "single", "")


def test_a_batch_script_is_not_a_task() -> None:
    """sbatch sets SLURM_PROCID and SLURM_NTASKS for the script itself; only srun sets a step."""
    env = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert detect_process(env).launcher == "single"


def test_torchrun_below_a_slurm_task_decides() -> None:
    env = {**TORCHRUN, **SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", **RENDEZVOUS}
    assert detect_process(env).launcher == "torchrun"


def test_mpirun_below_slurm_decides() -> None:
    """Its daemons are tasks of srun, so Slurm's numbers are those of the daemon."""
    process = detect_process({**MPI, **SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "2", **RENDEZVOUS})
    assert (process.launcher, process.rank, process.world_size) == ("mpi", 3, 4)


def test_missing_rendezvous_is_named() -> None:
    with pytest.raises(LaunchError, match="MASTER_PORT is not set"):
        detect_process({**TORCHRUN, "MASTER_ADDR": "node1"})


@pytest.mark.parametrize(("name", "value"), [("RANK", "4"), ("RANK", "-1"), ("WORLD_SIZE", "many")])
def test_nonsense_is_refused(name: str, value: str) -> None:
    with pytest.raises(LaunchError):
        detect_process({**TORCHRUN, **RENDEZVOUS, name: value})
