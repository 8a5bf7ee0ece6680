"""Checkpoints of a run: save, find the newest good one, load, keep the right ones.

    RUN/checkpoints/
        step_00000500/
            model/        distributed checkpoint of the weights
            optimizer/    distributed checkpoint of the optimizer state
            data.json     what the run's data was up to here
            manifest.json what it is, size and digest of every file
        latest            name of the newest complete checkpoint
        rewound_001/      newer checkpoints than the one that the run was told to go on from

A checkpoint is written as `step_X.tmp`, made durable, and renamed; then `latest` is replaced. A crash at any
moment leaves the older checkpoint and at most a `.tmp` that the next run removes.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import (
    MODEL_FOLDER,
    OPTIMIZER_FOLDER,
    HFMetadata,
    Manifest,
    read_manifest,
    write_manifest,
)
from megatron_qwenvl.checkpoint.storage.run_folder import (
    POINTER_NAME,
    checkpoint_name,
    checkpoints_of_run,
    step_of,
)
from megatron_qwenvl.checkpoint.storage.writing import FileRecord, replace_bytes, sync_directory, write_bytes
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.engine.checkpoint_state import ShardedState
from megatron_qwenvl.runtime.listing import matching_entries
from megatron_qwenvl.runtime.retry import reads

from .folder import FolderSave, load_folder, was_sharded
from .ranks import Ranks, attempt, find_damage
from .rewind import Rewind, is_rewound, move_newer_checkpoints, of_step
from .start import check_resume

logger = logging.getLogger(__name__)

TOGETHER_SECONDS = 10.0
"""Ranks that stop for the same reason notice it within this time."""


@dataclass
class _Pending:
    """A save whose files are being written."""

    step: int
    folders: dict[str, FolderSave]
    progress: dict[str, Any]
    extra_files: Mapping[str, bytes]
    writing: Future[Exception | None]
    began: float
    stall: float


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


@dataclass(frozen=True)
class Loaded:
    """A training checkpoint in memory."""

    manifest: Manifest
    """Its manifest; `progress` holds what `save` was given."""
    model: ShardedState
    """The asked-for model state with tensors in place of shards."""
    optimizer: ShardedState
    """The asked-for optimizer state."""


class CheckpointManager:
    """Saves and loads the checkpoints of one run. All methods are collective over all ranks.

    Args:
        directory: the run's checkpoints folder, on a file system that all ranks share.
        config: the run; its stage, model and layout are recorded, and `checkpoint` says what is kept and whether
            files are written in a thread while training goes on.
    """

    def __init__(self, directory: Path, config: RunConfig) -> None:
        self._directory = directory
        self._config = config
        self._keep_last = config.checkpoint.keep_last
        self._keep_every = config.checkpoint.keep_every
        self._asynchronous = config.checkpoint.asynchronous
        self._pending: _Pending | None = None
        self._damaged: set[int] = set()
        self._guard: Callable[[], None] = lambda: None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.ranks = Ranks(config.checkpoint.timeout_minutes)
        """All ranks, as checkpoints need them."""
        self.hf_metadata: HFMetadata | None = None
        """What is known of the published directory that the run's weights come from; every save records it."""

    def prepare(self, guard: Callable[[], None] = lambda: None) -> None:
        """Make the folder ready for saves: the first thing that changes anything in it. Remove what an interrupted run
        left behind, and let `latest` name the newest checkpoint if that run could not.

        Args:
            guard: called on every rank before it writes, now and later; raises where it may not.

        Raises:
            CheckpointError: on every rank, if that fails.
        """
        self._guard = guard
        self.ranks.run_on_rank0(
            lambda: reads(self._directory, self._tidy), f"{self._directory}: cannot be prepared"
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
            began: when training stopped for this save, by `time.monotonic`; none: now.
            beside: small files of the checkpoint by name; rank 0's are written.

        Returns:
            What was saved, or None if the save goes on in the background (see `poll`).

        Raises:
            CheckpointError: on every rank, if any rank failed. Nothing of the failed checkpoint remains and
                the older ones are untouched.
        """
        self.wait()
        began = time.monotonic() if began is None else began
        tmp_dir = self._tmp_dir(step)
        try:
            self.ranks.run_on_rank0(lambda: self._make_folders(tmp_dir), f"{tmp_dir}: cannot be created")
            folders = {
                name: FolderSave(state, tmp_dir / name, self._asynchronous, self.ranks)
                for name, state in ((MODEL_FOLDER, model), (OPTIMIZER_FOLDER, optimizer))
            }
        except CheckpointError:
            self._discard(tmp_dir)
            raise
        if self._asynchronous:
            writing = self._thread.submit(self._write_all, folders)
        else:
            writing = Future()
            writing.set_result(self._write_all(folders))
        stall = time.monotonic() - began
        self._pending = _Pending(step, folders, progress, extra_files or {}, writing, began, stall)
        return None if self._asynchronous else self.wait()

    def poll(self) -> SaveReport | None:
        """Complete the background save if every rank has written its files; returns at once otherwise.

        Raises:
            CheckpointError: the save failed; see `save`.
        """
        if self._pending is None:
            return None
        return self.wait() if self.ranks.all_true(self._pending.writing.done()) else None

    def wait_if_all_arrive(self) -> SaveReport | None:
        """Complete the background save if every rank calls this; for a run that ends by an error which other ranks
        may not have, and which may not wait for them.

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
        tmp_dir = self._tmp_dir(pending.step)
        try:
            self.ranks.raise_on_any_error(
                pending.writing.result(), f"checkpoint of step {pending.step} was not written"
            )
            files = {
                f"{folder}/{name}": record
                for folder, save in pending.folders.items()
                for name, record in save.finish().items()
            }
            extra_files = self.ranks.run_on_rank0(
                lambda: _write_extra_files(tmp_dir, pending.extra_files), f"{tmp_dir}: not written"
            )
            manifest = self._manifest(pending, {**files, **(extra_files or {})})
            self.ranks.run_on_rank0(
                lambda: self._put_in_place(tmp_dir, manifest), f"{tmp_dir}: cannot be moved into place"
            )
        except CheckpointError:
            self._discard(tmp_dir)
            raise
        now = time.monotonic()
        return SaveReport(
            pending.step, pending.stall + now - waited, now - pending.began, manifest.total_bytes
        )

    def latest(self) -> Path | None:
        """The newest undamaged checkpoint, or None if the run has none. Every file of it has been read and
        compared with its digest, each rank reading its share; damaged ones are logged file by file.

        Raises:
            CheckpointError: there are checkpoints but all are damaged, or their folder cannot be read.
        """
        found = self.ranks.run_on_rank0(
            lambda: reads(self._directory, self._candidates), f"{self._directory}: cannot be read"
        )
        candidates = self.ranks.broadcast(found)
        for candidate in candidates:
            problems = find_damage(candidate, self.ranks)
            if not problems:
                return candidate
            self._damaged.add(step_of(candidate.with_suffix("")))
            if self.ranks.is_rank0:
                for problem in problems:
                    logger.error("damaged checkpoint: %s", problem)
        if candidates:
            raise CheckpointError(f"{self._directory}: all {len(candidates)} checkpoints are damaged")
        return None

    def rewind_to(self, step: int) -> Path | None:
        """The checkpoint of a step that the run is to go on from, compared with its digests; nothing is changed yet.

        Returns:
            None if the job was started again after it had gone back to this step.

        Raises:
            CheckpointError: there is none of this step, or it is damaged.
        """
        found = self.ranks.run_on_rank0(
            lambda: reads(
                self._directory,
                lambda: None if is_rewound(self._directory, step) else of_step(self._candidates(), step),
            ),
            f"{self._directory}: cannot go on from step {step}",
        )
        checkpoint: Path | None = self.ranks.broadcast(found)
        if checkpoint is None:
            if self.ranks.is_rank0:
                logger.info(
                    "this job has gone back to step %d already: going on from the newest checkpoint", step
                )
            return None
        if problems := find_damage(checkpoint, self.ranks):
            raise CheckpointError(f"damaged checkpoint: {'; '.join(problems[:4])}")
        return checkpoint

    def move_newer_checkpoints(self, step: int) -> Rewind:
        """Move the checkpoints after a step where the run's own search does not come, after `prepare`.

        Raises:
            CheckpointError: on every rank, if that fails.
        """

        def move() -> Rewind:
            self._guard()
            self._point_to(self._directory / checkpoint_name(step))
            return move_newer_checkpoints(self._directory, step)

        return self.ranks.broadcast(
            self.ranks.run_on_rank0(move, f"{self._directory}: newer checkpoints not set aside")
        )

    def _candidates(self) -> list[Path]:
        """What can be resumed from, from new to old: the checkpoints, and those that a crash left between the two
        renames of `_publish`."""
        orphans = [path for path in _replaced(self._directory) if not path.with_suffix("").exists()]
        found = [*checkpoints_of_run(self._directory), *orphans]
        return sorted(found, key=lambda path: step_of(path.with_suffix("")), reverse=True)

    def load(self, checkpoint: Path, model: ShardedState, optimizer: ShardedState) -> Loaded:
        """Load a training checkpoint into this rank's shards, at any layout.

        Raises:
            CheckpointError: not a training checkpoint, of another stage or model, or it holds more than data.
        """

        def read() -> Manifest:
            manifest = read_manifest(checkpoint)
            check_resume(checkpoint, manifest, self._config)
            return manifest

        manifest = self.ranks.run_on_every_rank(read, "cannot be resumed from")
        self.hf_metadata = manifest.hf_metadata
        return Loaded(
            manifest,
            load_folder(model, checkpoint / MODEL_FOLDER, self.ranks),
            self._load_optimizer(checkpoint / OPTIMIZER_FOLDER, optimizer),
        )

    def _load_optimizer(self, folder: Path, state: ShardedState) -> ShardedState:
        try:
            return load_folder(state, folder, self.ranks)
        except CheckpointError as error:
            saved, wanted = was_sharded(folder), self._config.optimizer.sharded
            if saved not in (None, wanted):
                raise CheckpointError(
                    f"{folder.parent}: expected the state of an optimizer with optimizer.sharded {wanted}, found one "
                    f"with {saved}: go on with --optimizer.sharded {str(saved).lower()}"
                ) from error
            if "param_groups" not in str(error):
                raise
            raise CheckpointError(
                f"{error}. Without optimizer.sharded a run cannot change between optimizer.vit_layer_decay 1 and "
                "less: set it as before"
            ) from error

    def _manifest(self, pending: _Pending, files: dict[str, Any]) -> Manifest:
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

    def _tmp_dir(self, step: int) -> Path:
        return self._directory / f"{checkpoint_name(step)}.tmp"

    def _make_folders(self, tmp_dir: Path) -> None:
        self._guard()
        shutil.rmtree(tmp_dir, ignore_errors=True)
        (tmp_dir / MODEL_FOLDER).mkdir(parents=True)
        (tmp_dir / OPTIMIZER_FOLDER).mkdir()

    def _put_in_place(self, tmp_dir: Path, manifest: Manifest) -> None:
        """Give the checkpoint its name. From then on it is the one that a run resumes from, so that what fails later
        is no failure of the save."""
        self._guard()
        write_manifest(tmp_dir, manifest)
        final = tmp_dir.with_suffix("")
        replaced = final.with_suffix(".old")
        if final.exists():  # the step was saved before, perhaps damaged: the new one takes its place
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        try:
            tmp_dir.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        self._damaged.discard(manifest.step)
        _warn("the checkpoint's name may not be durable yet", lambda: sync_directory(self._directory))
        self._point_to(final)
        shutil.rmtree(replaced, ignore_errors=True)
        _warn("older checkpoints were not removed", lambda: self._retire(manifest.step))

    def _point_to(self, checkpoint: Path) -> None:
        pointer = self._directory / POINTER_NAME
        _warn(
            f"{pointer} does not name {checkpoint.name}, the newest checkpoint",
            lambda: replace_bytes(pointer, f"{checkpoint.name}\n".encode()),
        )

    def _retire(self, newest: int) -> None:
        """Of the checkpoints up to `newest`, remove all but the last `keep_last` and those of `keep_every`.

        Damaged ones do not count as kept. Later steps, left from before a fall-back to an older checkpoint, are
        replaced when they are reached.
        """
        past = [path for path in checkpoints_of_run(self._directory) if step_of(path) <= newest]
        kept = [path for path in past if step_of(path) not in self._damaged][: self._keep_last]
        for path in past:
            if path in kept or (self._keep_every and step_of(path) % self._keep_every == 0):
                continue
            stale = path.with_suffix(".tmp")  # a half-removed checkpoint must not look like one
            path.rename(stale)
            shutil.rmtree(stale, ignore_errors=True)

    def _tidy(self) -> None:
        """Does only what is still to be done, however often it is begun."""
        self._guard()
        self._directory.mkdir(parents=True, exist_ok=True)
        for leftover in matching_entries(self._directory, "step_*.tmp"):
            shutil.rmtree(leftover)
        for replaced in _replaced(self._directory):
            if replaced.with_suffix("").exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(replaced.with_suffix(""))
        pointer = self._directory / POINTER_NAME
        newest = checkpoints_of_run(self._directory)[:1]
        if newest and not (
            pointer.is_file() and pointer.read_text(errors="replace").strip() == newest[0].name
        ):
            self._point_to(newest[0])

    def _discard(self, tmp_dir: Path) -> None:
        if self.ranks.is_rank0 and attempt(self._guard) is None:
            shutil.rmtree(tmp_dir, ignore_errors=True)

    def _write_all(self, folders: dict[str, FolderSave]) -> Exception | None:
        def write() -> None:
            self._guard()
            for folder in folders.values():
                folder.write()

        return attempt(write)


def _replaced(directory: Path) -> list[Path]:
    """Checkpoints that were set aside for a new one of the same step."""
    return matching_entries(directory, "step_*.old")


def _warn(consequence: str, action: Callable[[], object]) -> None:
    """Do what a checkpoint that is in place can do without, and only tell if it fails."""
    if error := attempt(action):
        logger.warning("%s: %s", consequence, error)


def _write_extra_files(tmp_dir: Path, files: Mapping[str, bytes]) -> dict[str, FileRecord]:
    return {name: write_bytes(tmp_dir / name, content) for name, content in files.items()}
