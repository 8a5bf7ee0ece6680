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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import (
    StrictHandling,
    determine_global_metadata,
    validate_sharding_integrity,
)
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from .collective import agree, attempt
from .files import CheckpointError, FileRecord, sync_directory, write_bytes, writing
from .items import StoredItem, write_index, write_item
from .pickles import check_data_only

ShardedState = dict[str, Any]
"""A megatron-core sharded state dict of this rank."""


def without_extra_state(state: ShardedState) -> ShardedState:
    """Drop Transformer Engine's `_extra_state` objects, which are empty without FP8, so that checkpoints of
    both layer specs are the same."""
    return extract_matching_values(
        state, lambda value: not (isinstance(value, ShardedBase) and value.key.endswith("_extra_state"))
    )[0]


class FolderSave:
    """A save of one folder in three steps: plan (collective), write (local), finish (collective).

    Args:
        state: this rank's sharded state dict; consumed.
        folder: empty existing directory, the same on all ranks.
        snapshot: copy the tensors to host memory now, so that training may change them while `write` runs.
    """

    def __init__(self, state: ShardedState, folder: Path, snapshot: bool) -> None:
        self._folder = folder
        sharded, self._common = save_preprocess(without_extra_state(state), validate_access_integrity=False)
        _, shards_of_all_ranks = determine_global_metadata(sharded)
        agree(
            attempt(lambda: validate_sharding_integrity(shards_of_all_ranks)),
            f"{folder}: inconsistent shards",
        )
        self._index, self._items = _plan(sharded)
        if snapshot:
            self._items = [(item, _host_copy(data, always=True)) for item, data in self._items]
        self._stored: list[StoredItem] = []
        self._files: dict[str, FileRecord] = {}

    def write(self) -> None:
        """Write this rank's items, durably. No collectives.

        Raises:
            OSError: the file system refused.
        """
        rank = dist.get_rank()
        if self._items:
            name = f"__{rank}_0.distcp"
            with writing(self._folder / name) as file:
                while self._items:  # a snapshot's memory is given back as it is written
                    item, data = self._items.pop(0)
                    self._stored.append(write_item(file, name, item, _host_copy(data)))
                self._files[name] = file.sync()
        if rank == 0:
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
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((self._stored, self._files), gathered)
        files: dict[str, FileRecord] = {}

        def write() -> None:
            assert gathered is not None and self._index is not None
            stored = [item for items, _ in gathered for item in items]
            files[".metadata"] = write_index(self._folder, self._index, stored)
            for _, written in gathered:
                files.update(written)
            sync_directory(self._folder)

        agree(attempt(write) if gathered is not None else None, f"{self._folder}: index not written")
        return files


def _plan(sharded: ShardedState) -> tuple[Metadata | None, list[tuple[Any, Tensor | io.BytesIO]]]:
    """The index without places (rank 0) and this rank's items. Collective."""
    main_replicas, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(main_replicas), is_coordinator=dist.get_rank() == 0)
    local = planner.create_local_plan()
    plans: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(local, plans)
    index: list[Metadata] = []
    error = None if plans is None else attempt(lambda: index.append(planner.create_global_plan(plans)[1]))
    agree(error, "tensors cannot be laid out in a checkpoint")
    planner.finish_plan(local)
    items = [(item.index, planner.resolve_data(item)) for item in local.items]
    return (index[0] if index else None), items


def _host_copy(data: Tensor | io.BytesIO, always: bool = False) -> Tensor | io.BytesIO:
    """A contiguous CPU tensor with a storage of its own; copied only where needed unless `always`."""
    if isinstance(data, io.BytesIO):
        return data
    host = data.detach().cpu().contiguous()
    shared = host.data_ptr() == data.data_ptr()
    owns_storage = host.untyped_storage().nbytes() == host.numel() * host.element_size()
    return host.clone() if (shared and always) or not owns_storage else host


def load_folder(state: ShardedState, folder: Path) -> ShardedState:
    """Load a folder into this rank's shards, at any parallel layout. Collective.

    Args:
        state: sharded state dict that says what this rank wants.
        folder: folder written by `FolderSave` or by the streaming converter.

    Returns:
        `state`'s structure with plain tensors.

    Raises:
        CheckpointError: the folder holds more than data, or its tensors are not those asked for.
    """
    agree(attempt(lambda: check_data_only(folder)) if dist.get_rank() == 0 else None, "refused")
    try:
        with torch.no_grad():
            return dist_checkpointing.load(
                without_extra_state(state),
                str(folder),
                validate_access_integrity=False,
                strict=StrictHandling.RAISE_ALL,
            )
    except (dist_checkpointing.core.CheckpointingException, KeyError) as error:
        raise CheckpointError(f"{folder}: does not hold what the run needs: {error}") from error
