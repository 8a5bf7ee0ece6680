"""A save in progress: the files that every rank writes, and their completion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwenvl.checkpoint.storage.manifest import MODEL_FOLDER, OPTIMIZER_FOLDER
from megatron_qwenvl.checkpoint.storage.writing import FileRecord, write_bytes
from megatron_qwenvl.engine.checkpoint_state import ShardedState

from .ranks import Ranks, attempt
from .sharded_folder import FolderSave


@dataclass(frozen=True)
class SaveReport:
    """A completed save."""

    step: int
    """Step of the checkpoint."""
    stall_seconds: float
    """Time for which training stood still: from the beginning of the save until its writing went on in the background,
    and for its completion, also where the next save had to wait for that."""
    total_seconds: float
    """Time from the beginning of the save until the checkpoint was in place."""
    bytes: int
    """Size of the checkpoint."""


@dataclass
class PendingSave:
    """A save whose files are being written."""

    step: int
    tmp_dir: Path
    folders: dict[str, FolderSave]
    progress: dict[str, Any]
    """Counters and schedule for the manifest."""
    extra_files: Mapping[str, bytes]
    """Small files of the checkpoint by name; rank 0's are written."""
    writing: Future[Exception | None]
    """Ends when this rank has written its files, with the error if it failed."""
    began: float
    """Time at which training stopped for this save, by `time.monotonic`."""
    stall: float
    """Seconds until training went on."""

    def finish(self, ranks: Ranks) -> dict[str, FileRecord]:
        """Wait for the files of all ranks and complete them. Collective.

        Returns:
            On rank 0 the records of all files, elsewhere nothing.

        Raises:
            CheckpointError: on every rank, if any failed.
        """
        ranks.raise_on_any_error(self.writing.result(), f"checkpoint of step {self.step} was not written")
        files = {
            f"{folder}/{name}": record
            for folder, save in self.folders.items()
            for name, record in save.finish().items()
        }
        extra = ranks.run_on_rank0(self._write_extra_files, f"{self.tmp_dir}: not written")
        return {**files, **(extra or {})}

    def _write_extra_files(self) -> dict[str, FileRecord]:
        return {name: write_bytes(self.tmp_dir / name, content) for name, content in self.extra_files.items()}


def plan_folders(
    tmp_dir: Path, model: ShardedState, optimizer: ShardedState, snapshot: bool, ranks: Ranks
) -> dict[str, FolderSave]:
    """Plan the folders of a checkpoint. Collective; see `FolderSave`."""
    return {
        name: FolderSave(state, tmp_dir / name, snapshot, ranks)
        for name, state in ((MODEL_FOLDER, model), (OPTIMIZER_FOLDER, optimizer))
    }


def write_folders(folders: Mapping[str, FolderSave], guard: Callable[[], None]) -> Exception | None:
    """Write this rank's files and return the error if that fails. Not collective: may run in a thread.

    Args:
        folders: the planned folders.
        guard: called first; raises if this process may not write any more.
    """

    def write() -> None:
        guard()
        for folder in folders.values():
            folder.write()

    return attempt(write)
