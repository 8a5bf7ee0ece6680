"""One folder of a training checkpoint, written and read by all ranks.

`engine.checkpoint_state` defines what is stored; here the ranks do it together. Writing is a plain function without
collectives, so that it can run in a thread while training continues, and failures reach every rank.
"""

from __future__ import annotations

from pathlib import Path

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.writing import FileRecord, open_durable, sync_directory
from megatron_qwenvl.engine.checkpoint_index import INDEX_NAME, check_data_only, write_common
from megatron_qwenvl.engine.checkpoint_items import StoredItem, write_index, write_item
from megatron_qwenvl.engine.checkpoint_state import (
    ShardedState,
    StatePlan,
    check_coverage,
    host_copy,
    is_gathered,
    load_common,
    load_state,
)

from .ranks import Ranks


def was_sharded(folder: Path) -> bool | None:
    """Whether the optimizer's state in a folder is that of a sharded optimizer; None: it cannot be read."""
    try:
        check_data_only(folder)
        return is_gathered(load_common(folder))
    except (CheckpointError, OSError):
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
        plan = _checked_plan(state, folder, ranks)
        self._common = plan.common
        problem = f"{folder}: tensors cannot be laid out in a checkpoint"
        own = ranks.run_on_every_rank(lambda: plan.lay_out(ranks.is_rank0), problem)
        plans = ranks.gather(own)
        self._index = ranks.run_on_rank0(lambda: plan.index(plans), problem)
        self._items = ranks.run_on_every_rank(
            lambda: plan.items(own, copied), f"{folder}: state cannot be copied to host memory"
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
            with open_durable(self._folder / name) as file:
                while self._items:  # a snapshot's memory is given back as it is written
                    item, data = self._items.pop(0)
                    self._stored.append(write_item(file, name, item, host_copy(data)))
                self._files[name] = file.sync()
        if self._ranks.is_rank0:
            self._files |= write_common(self._folder, self._common)

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
                INDEX_NAME: index,
                **{name: record for _, files in gathered for name, record in files.items()},
            }

        return self._ranks.run_on_rank0(write, f"{self._folder}: index not written") or {}


def _checked_plan(state: ShardedState, folder: Path, ranks: Ranks) -> StatePlan:
    """Plan the save of this rank, and make sure that all ranks together cover every tensor once. Collective."""

    def take_apart() -> tuple[StatePlan, list[object]]:
        plan = StatePlan(state)
        return plan, plan.describe()

    plan, described = ranks.run_on_every_rank(take_apart, f"{folder}: state cannot be saved")
    gathered = ranks.gather(described)
    ranks.run_on_rank0(lambda: check_coverage(gathered), f"{folder}: inconsistent shards")
    return plan


def load_folder(state: ShardedState, folder: Path, ranks: Ranks) -> ShardedState:
    """Load a folder into this rank's shards, at any parallel layout. Collective.

    Args:
        state: sharded state dict of the tensors that this rank needs.
        folder: folder written by `FolderSave` or by the streaming converter.
        ranks: all ranks.

    Returns:
        `state`'s structure with plain tensors.

    Raises:
        CheckpointError: on every rank, if the folder holds more than data, its tensors are not the requested ones, or a
            rank cannot read them.
    """
    ranks.run_on_rank0(lambda: check_data_only(folder), "refused")
    return ranks.run_on_every_rank(lambda: load_state(state, folder), "cannot be loaded")
