"""Contract: process groups come by name from `ProcessGroupCollection`; megatron-core's tracker is seeded; the errors of
gloo name a lost peer; the engine can be started again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_qwenvl.engine.start import is_lost_peer, start_engine, stop_engine
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks
from tests.distributed.model_cases import small_config


def groups(process: ProcessInfo) -> dict[str, int]:
    """Sizes of the groups that the model, the schedule and the optimizer ask for."""
    runtime = start_engine(small_config(tensor=2, pipeline=2), process)
    found = runtime.groups
    return {name: getattr(found, name).size() for name in ("tp", "pp", "dp", "mp", "cp")}


def test_process_groups_have_these_names() -> None:
    assert run_ranks(4, groups) == [{"tp": 2, "pp": 2, "dp": 1, "mp": 4, "cp": 1}] * 4


def outlives_its_peer(process: ProcessInfo) -> bool | None:
    """Rank 1 ends; whether rank 0 takes its next collective's error for that."""
    runtime = start_engine(small_config(tensor=2), process)
    if process.rank:
        return None
    try:
        for _ in range(2):
            runtime.barrier()
    except Exception as error:
        return is_lost_peer(error)
    return None


def test_a_lost_peer_is_recognised_by_the_errors_of_gloo() -> None:
    assert run_ranks(2, outlives_its_peer) == [True, None]


def start_twice(process: ProcessInfo) -> list[float]:
    """Start, draw and stop, twice in one process; torch is unchanged in between."""
    current_device, drawn = torch.cuda.current_device, []
    for _ in range(2):
        start_engine(small_config(), process)
        assert torch.cuda.current_device is not current_device and dist.is_initialized()
        assert "model-parallel-rng" in tensor_parallel.get_cuda_rng_tracker().get_states()
        drawn.append(float(torch.rand(1)))
        stop_engine()
        assert torch.cuda.current_device is current_device and not dist.is_initialized()
        assert not parallel_state.model_parallel_is_initialized()
    return drawn


def test_the_engine_starts_again_in_the_same_process() -> None:
    (drawn,) = run_ranks(1, start_alone)
    assert drawn[0] == drawn[1], "the seed is set at every start"


def start_alone(process: ProcessInfo) -> list[float]:
    """A process of its own has no rendezvous, whose file could serve one start only."""
    return start_twice(ProcessInfo(0, 1, 0, 1, None, process.launcher))
