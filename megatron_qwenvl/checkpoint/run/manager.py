"""Checkpoints of a run: save, find the newest good one, load, keep the right ones.

RUN/checkpoints/
    step_00000500/
        model/        distributed checkpoint of the weights
        optimizer/    distributed checkpoint of the optimizer state
        data.json     what the run's data was up to here
        manifest.json what it is, size and digest of every file
    latest            name of the newest complete checkpoint
    rewound_001/      newer checkpoints than the one that the run went back to
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import HFMetadata, Manifest
from megatron_qwenvl.checkpoint.storage.writing import FileRecord
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.engine.checkpoint_state import ShardedState
from megatron_qwenvl.runtime.retry import retry_read

from .checkpoints_folder import CheckpointsFolder
from .load import Loaded, load_training
from .ranks import Ranks
from .rewind import Rewind
from .saving import PendingSave, SaveReport, plan_folders, write_folders
from .search import find_newest, find_step
from .sharded_folder import FolderSave

TOGETHER_SECONDS = 10.0
"""Ranks that stop for the same reason notice it within this time."""


class CheckpointManager:
    """Saves and loads the checkpoints of one run. All methods are collective over all ranks.

    Args:
        directory: the run's checkpoints folder, on a file system that all ranks share.
        config: the run; its training stage, model and parallel layout are recorded, and `checkpoint` says which
            checkpoints are kept and whether files are written in a thread while training goes on.
    """

    def __init__(self, directory: Path, config: RunConfig) -> None:
        self._directory = directory
        self._config = config
        self._asynchronous = config.checkpoint.asynchronous
        self._folder = CheckpointsFolder(directory, config.checkpoint)
        self._pending: PendingSave | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.ranks = Ranks(config.checkpoint.timeout_minutes)
        """All ranks, as checkpoints need them."""
        self.hf_metadata: HFMetadata | None = None
        """Metadata of the Hugging Face directory that the run's weights come from; every save records it."""

    def prepare(self, guard: Callable[[], None] = lambda: None) -> None:
        """Make the folder ready for saves: the first thing that changes anything in it. Remove what an interrupted run
        left behind, and let `latest` name the newest checkpoint if that run could not.

        Args:
            guard: called on every rank before it writes, now and later; raises if the rank may not write.

        Raises:
            CheckpointError: on every rank, if that fails.
        """
        self._folder.guard = guard
        self.ranks.run_on_rank0(
            lambda: retry_read(self._directory, self._folder.prepare),
            f"{self._directory}: cannot be prepared",
        )

    def save(
        self,
        step: int,
        model: ShardedState,
        optimizer: ShardedState,
        progress: dict[str, Any],
        began: float | None = None,
        extra_files: Mapping[str, bytes] | None = None,
    ) -> SaveReport | None:
        """Save a checkpoint of `step`; an asynchronous save that is still running is finished first.

        Args:
            step: optimizer steps done.
            model: sharded state dict of the weights.
            optimizer: sharded state dict of the optimizer.
            progress: counters and schedule, equal on all ranks; JSON values.
            began: when training stopped for this save, by `time.monotonic`; None: now.
            extra_files: small files of the checkpoint by name; rank 0's are written.

        Returns:
            The completed save, or None if the save goes on in the background (see `poll`).

        Raises:
            CheckpointError: on every rank, if any rank failed. Nothing of the failed checkpoint remains and
                the older ones are untouched.
        """
        self.wait()
        began = time.monotonic() if began is None else began
        folders = self._plan(step, model, optimizer)
        writing = self._write(folders)
        stall = time.monotonic() - began
        tmp_dir = self._folder.tmp_dir(step)
        self._pending = PendingSave(
            step, tmp_dir, folders, progress, extra_files or {}, writing, began, stall
        )
        return None if self._asynchronous else self.wait()

    def poll(self) -> SaveReport | None:
        """Complete the background save if every rank has written its files; return at once otherwise.

        Raises:
            CheckpointError: the save failed; see `save`.
        """
        if self._pending is None:
            return None
        return self.wait() if self.ranks.all_true(self._pending.writing.done()) else None

    def wait_if_all_arrive(self) -> SaveReport | None:
        """Complete the background save if every rank calls this; for a run that ends by an error which other ranks
        may not have, and which must not wait for them.

        Raises:
            CheckpointError: the save failed; see `save`.
        """
        if self._pending is None or not self.ranks.all_arrive(TOGETHER_SECONDS):
            return None
        return self.wait()

    def wait(self) -> SaveReport | None:
        """Wait for the background save, if there is one, and complete it.

        Raises:
            CheckpointError: the save failed; see `save`.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        waited = time.monotonic()
        try:
            manifest = self._manifest(pending, pending.finish(self.ranks))
            self.ranks.run_on_rank0(
                lambda: self._folder.move_into_place(manifest),
                f"{pending.tmp_dir}: cannot be moved into place",
            )
        except CheckpointError:
            self._discard(pending.step)
            raise
        now = time.monotonic()
        return SaveReport(
            pending.step, pending.stall + now - waited, now - pending.began, manifest.total_bytes
        )

    def latest(self) -> Path | None:
        """Find the newest undamaged checkpoint; None: the run has none. See `find_newest`.

        Raises:
            CheckpointError: there are checkpoints but all are damaged, or their folder cannot be read.
        """
        newest, damaged = find_newest(self._directory, self.ranks)
        self._folder.damaged |= damaged
        return newest

    def rewind_to(self, step: int) -> Path | None:
        """Find the checkpoint of a step that the run is to go back to; changes nothing yet. See `find_step`.

        Returns:
            None if the job was started again after it had gone back to this step.

        Raises:
            CheckpointError: there is none of this step, or it is damaged.
        """
        return find_step(self._directory, step, self.ranks)

    def move_newer_checkpoints(self, step: int) -> Rewind:
        """Move the checkpoints after a step to where the run's own search does not find them; to be called after
        `prepare`.

        Raises:
            CheckpointError: on every rank, if that fails.
        """
        moved = self.ranks.run_on_rank0(
            lambda: self._folder.move_newer(step), f"{self._directory}: newer checkpoints were not moved"
        )
        return self.ranks.broadcast(moved)

    def load(self, checkpoint: Path, model: ShardedState, optimizer: ShardedState) -> Loaded:
        """Load a training checkpoint into this rank's shards, at any parallel layout. See `load_training`.

        Raises:
            CheckpointError: not a training checkpoint, of another training stage or model, or it holds more than data.
        """
        loaded = load_training(checkpoint, self._config, model, optimizer, self.ranks)
        self.hf_metadata = loaded.manifest.hf_metadata
        return loaded

    def _plan(self, step: int, model: ShardedState, optimizer: ShardedState) -> dict[str, FolderSave]:
        tmp_dir = self._folder.tmp_dir(step)
        try:
            self.ranks.run_on_rank0(lambda: self._folder.make_tmp_dir(step), f"{tmp_dir}: cannot be created")
            return plan_folders(tmp_dir, model, optimizer, self._asynchronous, self.ranks)
        except CheckpointError:
            self._discard(step)
            raise

    def _write(self, folders: dict[str, FolderSave]) -> Future[Exception | None]:
        if self._asynchronous:
            return self._thread.submit(write_folders, folders, self._folder.guard)
        writing: Future[Exception | None] = Future()
        writing.set_result(write_folders(folders, self._folder.guard))
        return writing

    def _manifest(self, pending: PendingSave, files: dict[str, FileRecord]) -> Manifest:
        config = self._config
        parallel = config.parallel
        return Manifest(
            kind="training",
            origin=config.stage,
            step=pending.step,
            steps=config.train.steps,
            recipe=config.name,
            image_size=config.data.image_size,
            model=config.model,
            parallel_sizes={
                "tensor": parallel.tensor,
                "pipeline": parallel.pipeline,
                "data": self.ranks.size // (parallel.tensor * parallel.pipeline),
            },
            hf_metadata=self.hf_metadata,
            progress=pending.progress,
            files=files,
        )

    def _discard(self, step: int) -> None:
        if self.ranks.is_rank0:
            self._folder.discard_tmp_dir(step)
