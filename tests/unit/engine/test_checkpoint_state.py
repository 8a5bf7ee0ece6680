"""Contract: a sharded state becomes torch's items without a process group, and megatron-core loads it again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

from megatron_qwenvl.checkpoint.run.ranks import Ranks
from megatron_qwenvl.checkpoint.run.sharded_folder import FolderSave
from megatron_qwenvl.engine.checkpoint_state import (
    StatePlan,
    check_coverage,
    host_copy,
    load_common,
    load_state,
    without_extra_state,
)
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks
from tests.unit.checkpoint.cases import failing, join, state, weights


def shard_of(rank: int) -> dict[str, Any]:
    """Half of a matrix, a replicated vector, an object and a number, as one of two ranks holds them."""
    return {
        "matrix": ShardedTensor.from_rank_offsets("matrix", weights(1).chunk(2)[rank], (0, rank, 2)),
        "vector": ShardedTensor.from_rank_offsets("vector", torch.ones(3), replica_id=rank),
        "object": ShardedObject("object", {"a": 1}, (1,), (0,), replica_id=rank),
        "lr": 0.5,
    }


def plan_of_two_ranks() -> tuple[list[StatePlan], list[Any]]:
    plans = [StatePlan(shard_of(rank)) for rank in range(2)]
    return plans, [plan.lay_out(is_rank0=rank == 0) for rank, plan in enumerate(plans)]


def test_save_preprocess_splits_shards_and_common_rest() -> None:
    plan = StatePlan(shard_of(0))
    assert plan.common == {"lr": 0.5}
    described = plan.describe()
    assert {shard.key for shard in described} == {"matrix", "vector", "object"}
    assert all(shard.data is None for shard in described)


def check_items(process: ProcessInfo) -> None:
    join(process)
    plans, local = plan_of_two_ranks()
    index = plans[0].index(local)
    stored = [plan.items(own, copied=False) for plan, own in zip(plans, local, strict=True)]
    names = [sorted(where.fqn.split("/")[0] for where, _ in items) for items in stored]
    assert names == [["matrix", "object", "vector"], ["matrix"]]
    assert len(index.state_dict_metadata["matrix"].chunks) == 2
    data = {where.fqn: data for where, data in stored[0]}
    assert torch.equal(data["matrix"], weights(1)[:4])  # type: ignore[arg-type]
    assert any(isinstance(value, io.BytesIO) for value in data.values()), "objects come serialised"


def test_a_rank_stores_its_main_replicas_and_plans_without_collectives() -> None:
    """One process plans for two ranks."""
    run_ranks(1, check_items)


def check_parts(process: ProcessInfo) -> list[str]:
    """Whether both halves cover the state, and one alone."""
    join(process)
    described = [StatePlan(shard_of(rank)).describe() for rank in range(2)]
    return [failing(lambda: check_coverage(described)), failing(lambda: check_coverage(described[:1]))]


def test_a_tensor_that_the_ranks_do_not_cover_is_noticed() -> None:
    ((whole, half),) = run_ranks(1, check_parts)
    assert whole == "" and half.startswith("CheckpointingException"), (whole, half)


def test_extra_state_of_transformer_engine_is_dropped() -> None:
    extra = {"weight._extra_state": ShardedObject("weight._extra_state", None, (1,), (0,))}
    assert without_extra_state({**shard_of(0), **extra}).keys() == shard_of(0).keys()


def test_a_host_copy_owns_its_memory() -> None:
    base = torch.arange(10.0)
    view = base[2:5]
    assert host_copy(view).data_ptr() == view.data_ptr()  # type: ignore[union-attr]
    copy = host_copy(view, always=True)
    base.zero_()
    assert torch.equal(copy, torch.tensor([2.0, 3.0, 4.0]))  # type: ignore[arg-type]


def save(process: ProcessInfo, folder: Path) -> None:
    join(process)
    begun = FolderSave({**state(5), "lr": 0.5}, folder, snapshot=False, ranks=Ranks(1))
    begun.write()
    begun.finish()


def load(process: ProcessInfo, folder: Path) -> None:
    join(process)
    assert load_common(folder) == {"lr": 0.5}
    loaded = load_state(state(0, axis=1), folder)
    assert torch.equal(loaded["matrix"], weights(5))
    other = {"missing": ShardedTensor.from_rank_offsets("missing", torch.zeros(2))}
    assert "does not hold what the run needs" in failing(lambda: load_state(other, folder))


def test_megatron_core_loads_what_two_ranks_wrote_here(tmp_path: Path) -> None:
    run_ranks(2, save, tmp_path)
    run_ranks(1, load, tmp_path)
