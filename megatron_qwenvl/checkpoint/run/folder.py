"""One folder of a training checkpoint, written and read by all ranks through megatron-core.

megatron-core describes what each rank holds (sharded state dicts), torch's planner turns that into items and
an index; writing the items happens here instead of in megatron-core's file writer. That one forks processes,
starts a manager process and, when one rank fails to write, leaves the others waiting. Here writing is a
plain function without collectives, so it can run in a thread while training continues, and failures reach
every rank.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling, validate_sharding_integrity
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_qwenvl.checkpoint.storage.files import (
    CheckpointError,
    FileRecord,
    sync_directory,
    write_bytes,
    writing,
)
from megatron_qwenvl.engine.checkpoint_index import check_data_only
from megatron_qwenvl.engine.checkpoint_items import StoredItem, with_own_storage, write_index, write_item
from megatron_qwenvl.engine.checkpoint_reads import patient_engine_reads

from .ranks import Ranks

ShardedState = dict[str, Any]
"""A megatron-core sharded state dict of this rank."""

_Item = tuple[Any, Tensor | io.BytesIO]
"""What is stored under which index."""


def without_extra_state(state: ShardedState) -> ShardedState:
    """Drop Transformer Engine's `_extra_state` objects, which are empty without FP8, so that checkpoints of
    both layer specs are the same."""
    return extract_matching_values(
        state, lambda value: not (isinstance(value, ShardedBase) and value.key.endswith("_extra_state"))
    )[0]


def is_gathered(state: ShardedState) -> bool:
    """Whether the state is an optimizer's that megatron-core has gathered into host memory of its own, which
    training does not change."""
    return state.get("param_state_sharding_type") == "fully_reshardable"


def was_sharded(folder: Path) -> bool | None:
    """Whether the optimizer's state in a folder is that of a sharded optimizer; None: it cannot be read."""
    try:
        check_data_only(folder)
        with patient_engine_reads():
            return is_gathered(dist_checkpointing.load_common_state_dict(str(folder)))
    except (CheckpointError, OSError, dist_checkpointing.core.CheckpointingException):
        return None


class FolderSave:
    """A save of one folder in three steps: plan (collective), write (local), finish (collective).

    Args:
        state: this rank's sharded state dict; consumed.
        folder: empty existing directory, the same on all ranks.
        snapshot: copy the tensors to host memory now, so that training may change them while `write` runs.
        ranks: all ranks.

    Raises:
        CheckpointError: on every rank, if the state of any cannot be laid out or copied.
    """

    def __init__(self, state: ShardedState, folder: Path, snapshot: bool, ranks: Ranks) -> None:
        self._folder = folder
        self._ranks = ranks
        copied = snapshot and not is_gathered(state)
        sharded, self._common = _checked(state, folder, ranks)
        self._index, local = _plan(sharded, folder, ranks)
        self._items = ranks.each(
            lambda: [(where, _host_copy(data, always=True) if copied else data) for where, data in local()],
            f"{folder}: state cannot be copied to host memory",
        )
        self._stored: list[StoredItem] = []
        self._files: dict[str, FileRecord] = {}

    def write(self) -> None:
        """Write this rank's items, durably. No collectives.

        Raises:
            OSError: the file system refused.
        """
        if self._items:
            name = f"__{self._ranks.rank}_0.distcp"
            with writing(self._folder / name) as file:
                while self._items:  # a snapshot's memory is given back as it is written
                    item, data = self._items.pop(0)
                    self._stored.append(write_item(file, name, item, _host_copy(data)))
                self._files[name] = file.sync()
        if self._ranks.is_main:
            content = io.BytesIO()
            torch.save(self._common, content)
            self._files[COMMON_STATE_FNAME] = write_bytes(
                self._folder / COMMON_STATE_FNAME, content.getvalue()
            )
            engine = json.dumps(asdict(CheckpointingConfig("torch_dist", 1)))
            self._files[CONFIG_FNAME] = write_bytes(self._folder / CONFIG_FNAME, engine.encode())

    def finish(self) -> dict[str, FileRecord]:
        """Write the index after every rank's `write` succeeded. Collective.

        Returns:
            On rank 0 the records of all files, elsewhere nothing.

        Raises:
            CheckpointError: on every rank, if the index cannot be written.
        """
        gathered = self._ranks.gather((self._stored, self._files))

        def write() -> dict[str, FileRecord]:
            assert self._index is not None
            index = write_index(self._folder, self._index, [item for items, _ in gathered for item in items])
            sync_directory(self._folder)
            return {
                ".metadata": index,
                **{name: record for _, files in gathered for name, record in files.items()},
            }

        return self._ranks.run_on_rank0(write, f"{self._folder}: index not written") or {}


def _checked(state: ShardedState, folder: Path, ranks: Ranks) -> tuple[ShardedState, dict[str, Any]]:
    """The shards and the common rest of `state`, after making sure that the main replicas of all ranks cover every
    tensor once. Collective."""

    def take_apart() -> tuple[ShardedState, dict[str, Any], list[Any]]:
        sharded, common = save_preprocess(without_extra_state(state), validate_access_integrity=False)
        return sharded, common, [shard.without_data() for shard in nested_values(sharded)]

    sharded, common, described = ranks.each(take_apart, f"{folder}: state cannot be saved")
    gathered = ranks.gather(described)
    ranks.run_on_rank0(lambda: validate_sharding_integrity(gathered), f"{folder}: inconsistent shards")
    return sharded, common


def _plan(
    sharded: ShardedState, folder: Path, ranks: Ranks
) -> tuple[Metadata | None, Callable[[], list[_Item]]]:
    """The index without places (rank 0), and what gives this rank's items. Collective."""
    problem = f"{folder}: tensors cannot be laid out in a checkpoint"
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)

    def plan() -> Any:
        main_replicas, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        planner.set_up_planner(mcore_to_pyt_state_dict(main_replicas), is_coordinator=ranks.is_main)
        return planner.create_local_plan()

    local = ranks.each(plan, problem)
    plans = ranks.gather(local)
    index = ranks.run_on_rank0(lambda: planner.create_global_plan(plans)[1], problem)
    planner.finish_plan(local)
    return index, lambda: [(item.index, planner.resolve_data(item)) for item in local.items]


def _host_copy(data: Tensor | io.BytesIO, always: bool = False) -> Tensor | io.BytesIO:
    """A contiguous CPU tensor with a storage of its own; copied only where needed unless `always`."""
    if isinstance(data, io.BytesIO):
        return data
    host = data.detach().cpu().contiguous()
    shared = host.data_ptr() == data.data_ptr()
    return host.clone() if shared and always else with_own_storage(host)


def load_folder(state: ShardedState, folder: Path, ranks: Ranks) -> ShardedState:
    """Load a folder into this rank's shards, at any parallel layout. Collective.

    Args:
        state: sharded state dict that says what this rank wants.
        folder: folder written by `FolderSave` or by the streaming converter.
        ranks: all ranks.

    Returns:
        `state`'s structure with plain tensors.

    Raises:
        CheckpointError: the folder holds more than data, its tensors are not those asked for, or a rank cannot read
            them.
    """
    ranks.run_on_rank0(lambda: check_data_only(folder), "refused")
    try:
        with torch.no_grad(), patient_engine_reads():
            return dist_checkpointing.load(
                without_extra_state(state),
                str(folder),
                validate_access_integrity=False,
                strict=StrictHandling.RAISE_ALL,
            )
    except (dist_checkpointing.core.CheckpointingException, KeyError, ValueError) as error:
        reason = shorten(str(error), 500, placeholder=" ...")  # it lists every tensor
        raise CheckpointError(f"{folder}: does not hold what the run needs: {reason}") from error
    except (
        CheckpointException
    ) as error:  # torch tells all ranks what went wrong on one, outside of `Exception`
        reasons = [f"rank {rank}: {reason}" for rank, (reason, _) in error.failures.items()]
        raise CheckpointError(f"{folder}: cannot be read: {'; '.join(reasons[:4])}") from error
