"""The sharded state of one rank, made into what is stored, and loaded again; no collectives here but in `load_state`.

Relies on these parts of `megatron.core.dist_checkpointing`, which are not its documented interface:

- `save_preprocess` splits a state dict into shards and a common rest, and `without_data` describes a shard;
- `_replace_state_dict_keys_with_sharded_keys` and `mcore_to_pyt_state_dict` make shards into torch's own;
- `MCoreSavePlanner` plans without collectives: a local plan each, and a global plan that makes the index;
- a sharded optimizer's state names its format by `param_state_sharding_type` (`tests/unit/engine/test_optimizer.py`);
- `load` reads what is written this way at any layout; in 0.16 the ranks read together, in 0.19 each alone.

megatron-core's own writer is not used: it forks processes, and when one rank fails to write, the others wait for it.
Held by `tests/unit/engine/test_checkpoint_state.py`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling, validate_sharding_integrity
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError

from .checkpoint_items import with_own_storage
from .checkpoint_reads import patient_engine_reads
from .versions import engine_is_at_least

ShardedState = dict[str, Any]
"""A megatron-core sharded state dict of this rank."""

Item = tuple[MetadataIndex, Tensor | io.BytesIO]
"""A tensor or serialised object with its index."""


def without_extra_state(state: ShardedState) -> ShardedState:
    """Drop Transformer Engine's `_extra_state` objects, which are empty without FP8, so that checkpoints of
    both layer specs are the same."""
    kept: ShardedState = extract_matching_values(
        state, lambda value: not (isinstance(value, ShardedBase) and value.key.endswith("_extra_state"))
    )[0]
    return kept


def is_gathered(state: ShardedState) -> bool:
    """Return whether the state is an optimizer's that megatron-core has gathered into host memory of its own, which
    training does not change."""
    return state.get("param_state_sharding_type") == "fully_reshardable"


def check_coverage(described: Sequence[list[ShardedBase]]) -> None:
    """Make sure that the main replicas of all ranks cover every tensor once.

    Args:
        described: `StatePlan.describe` of every rank.

    Raises:
        CheckpointingException: naming a tensor that they do not cover.
    """
    validate_sharding_integrity(described)


class StatePlan:
    """Plan of the items that this rank stores of a state.

    Args:
        state: this rank's sharded state dict; consumed.
    """

    def __init__(self, state: ShardedState) -> None:
        self._sharded, self.common = save_preprocess(
            without_extra_state(state), validate_access_integrity=False
        )
        """`common`: what is no shard, the same on all ranks."""
        self._planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)

    def describe(self) -> list[ShardedBase]:
        """This rank's shards without their data, for `check_coverage`."""
        return [shard.without_data() for shard in nested_values(self._sharded)]

    def lay_out(self, is_rank0: bool) -> SavePlan:
        """The items of which this rank holds the main replica."""
        main_replicas, _, _ = _replace_state_dict_keys_with_sharded_keys(
            self._sharded, keep_only_main_replica=True
        )
        self._planner.set_up_planner(mcore_to_pyt_state_dict(main_replicas), is_coordinator=is_rank0)
        plan: SavePlan = self._planner.create_local_plan()
        return plan

    def index(self, plans: list[SavePlan]) -> Metadata:
        """The index of the items of all ranks, without their places; on rank 0.

        Args:
            plans: what `lay_out` gave on every rank, in their order.
        """
        index: Metadata = self._planner.create_global_plan(plans)[1]
        return index

    def items(self, own: SavePlan, copied: bool) -> list[Item]:
        """This rank's items with their data, which the plan then does not need any more.

        Args:
            own: what `lay_out` gave here.
            copied: copy the tensors to host memory, so that training may change them.
        """
        self._planner.finish_plan(own)
        found = ((item.index, self._planner.resolve_data(item)) for item in own.items)
        return [(index, host_copy(data, always=True) if copied else data) for index, data in found]


def host_copy(data: Tensor | io.BytesIO, always: bool = False) -> Tensor | io.BytesIO:
    """A contiguous CPU tensor with a storage of its own; copied only where needed unless `always`."""
    if isinstance(data, io.BytesIO):
        return data
    host = data.detach().cpu().contiguous()
    shared = host.data_ptr() == data.data_ptr()
    return host.clone() if shared and always else with_own_storage(host)


def load_state(state: ShardedState, folder: Path) -> ShardedState:
    """Load a folder into this rank's shards, at any parallel layout. Collective, but an error here may be one of this
    rank alone.

    Args:
        state: sharded state dict that says what this rank wants.
        folder: a folder whose files were checked by `check_data_only` before.

    Returns:
        `state`'s structure with plain tensors.

    Raises:
        CheckpointError: its tensors are not those asked for, or a rank cannot read them.
    """
    try:
        with torch.no_grad(), patient_engine_reads():
            loaded: ShardedState = dist_checkpointing.load(
                without_extra_state(state),
                str(folder),
                validate_access_integrity=False,
                strict=StrictHandling.RAISE_ALL,
            )
            return loaded
    except (dist_checkpointing.core.CheckpointingException, KeyError, ValueError) as error:
        reason = shorten(str(error), 500, placeholder=" ...")  # it lists every tensor
        raise CheckpointError(f"{folder}: does not hold what the run needs: {reason}") from error
    except CheckpointException as error:  # of torch; it is no `Exception`
        raise CheckpointError(f"{folder}: cannot be read: {_failures(error)}") from error


def _failures(error: CheckpointException) -> str:
    """Describe the failures by rank. From megatron-core 0.19 on every rank loads by itself and knows only its own."""
    failures = list(error.failures.items())[:4]
    if engine_is_at_least(0, 19):
        return "; ".join(str(reason) for _, (reason, _) in failures)
    return "; ".join(f"rank {rank}: {reason}" for rank, (reason, _) in failures)


def load_common(folder: Path) -> ShardedState:
    """Load the common part of a folder.

    Raises:
        CheckpointError: it is not there or no distributed checkpoint.
        OSError: the file system refused.
    """
    try:
        with patient_engine_reads():
            common: ShardedState = dist_checkpointing.load_common_state_dict(str(folder))
            return common
    except dist_checkpointing.core.CheckpointingException as error:
        raise CheckpointError(f"{folder}: no distributed checkpoint: {error}") from None
