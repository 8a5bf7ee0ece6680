"""Checkpoints of a run: save, find the newest good one, load, keep the right ones.

    RUN/checkpoints/
        step_00000500/
            model/        distributed checkpoint of the weights
            optimizer/    distributed checkpoint of the optimizer state
            manifest.json what it is, size and digest of every file
        latest            name of the newest complete checkpoint

A checkpoint is written as `step_X.tmp`, made durable, and renamed; then `latest` is replaced. A crash at any
moment leaves the older checkpoint and at most a `.tmp` that the next run removes.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_qwenvl.config.schema import RunConfig

from .collective import agree, attempt, find_problems
from .files import CheckpointError, replace_bytes, sync_directory
from .manifest import (
    MODEL_FOLDER,
    OPTIMIZER_FOLDER,
    POINTER_NAME,
    Manifest,
    model_differences,
    read_manifest,
    write_manifest,
)
from .shards import FolderSave, ShardedState, load_folder

logger = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step_(\d{8,})$")


@dataclass
class _Pending:
    """A save whose files are being written."""

    step: int
    folders: dict[str, FolderSave]
    progress: dict[str, Any]
    writing: Future[Exception | None]
    began: float
    stall: float


@dataclass(frozen=True)
class SaveReport:
    """A completed save."""

    step: int
    """Step of the checkpoint."""
    stall_seconds: float
    """Time for which training stood still."""
    total_seconds: float
    """Time from the call of `save` until `latest` pointed at the checkpoint."""
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
        config: the run; its stage, model and layout are recorded.
        keep_every: checkpoints at multiples of this step are never removed; 0: none.
        asynchronous: write files in a thread while training goes on; tensors are copied to host memory first.
    """

    def __init__(
        self, directory: Path, config: RunConfig, keep_every: int = 0, asynchronous: bool = False
    ) -> None:
        self._directory = directory
        self._config = config
        self._keep_last = config.checkpoint.keep_last
        self._keep_every = keep_every
        self._asynchronous = asynchronous
        self._pending: _Pending | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._on_main(self._tidy, f"{directory}: cannot be prepared")

    def save(
        self, step: int, model: ShardedState, optimizer: ShardedState, progress: dict[str, Any]
    ) -> SaveReport | None:
        """Save a checkpoint of `step`; an asynchronous save that is still running is finished first.

        Args:
            step: optimizer steps done.
            model: sharded state dict of the weights.
            optimizer: sharded state dict of the optimizer.
            progress: counters and schedule, equal on all ranks; JSON values.

        Returns:
            What was saved, or None if the save goes on in the background (see `poll`).

        Raises:
            CheckpointError: on every rank, if any rank failed. Nothing of the failed checkpoint remains and
                the older ones are untouched.
        """
        self.wait()
        began = time.monotonic()
        aside = self._aside(step)
        try:
            self._on_main(lambda: self._make_folders(aside), f"{aside}: cannot be created")
            folders = {
                name: FolderSave(state, aside / name, self._asynchronous)
                for name, state in ((MODEL_FOLDER, model), (OPTIMIZER_FOLDER, optimizer))
            }
        except CheckpointError:
            self._discard(aside)
            raise
        if self._asynchronous:
            writing = self._thread.submit(_write_all, folders)
        else:
            writing = Future()
            writing.set_result(_write_all(folders))
        self._pending = _Pending(step, folders, progress, writing, began, time.monotonic() - began)
        return None if self._asynchronous else self.wait()

    def poll(self) -> SaveReport | None:
        """Complete the background save if every rank has written its files; returns at once otherwise.

        Raises:
            CheckpointError: the save failed; see `save`.
        """
        if self._pending is None:
            return None
        done = [False] * dist.get_world_size()
        dist.all_gather_object(done, self._pending.writing.done())
        return self.wait() if all(done) else None

    def wait(self) -> SaveReport | None:
        """Wait for the background save, if there is one, and complete it.

        Raises:
            CheckpointError: the save failed; see `save`.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        waited = time.monotonic()
        aside = self._aside(pending.step)
        try:
            agree(pending.writing.result(), f"checkpoint of step {pending.step} was not written")
            files = {
                f"{folder}/{name}": record
                for folder, save in pending.folders.items()
                for name, record in save.finish().items()
            }
            manifest = self._manifest(pending, files)
            self._on_main(lambda: self._publish(aside, manifest), f"{aside}: cannot be published")
        except CheckpointError:
            self._discard(aside)
            raise
        now = time.monotonic()
        return SaveReport(
            pending.step, pending.stall + now - waited, now - pending.began, manifest.total_bytes
        )

    def latest(self) -> Path | None:
        """The newest undamaged checkpoint, or None if the run has none. Every file of it has been read and
        compared with its digest, each rank reading its share; damaged ones are logged file by file.

        Raises:
            CheckpointError: there are checkpoints but all are damaged.
        """
        shared: list[list[Path]] = [self._candidates() if dist.get_rank() == 0 else []]
        dist.broadcast_object_list(shared, src=0)
        for candidate in shared[0]:
            problems = find_problems(candidate)
            if not problems:
                return candidate
            if dist.get_rank() == 0:
                for problem in problems:
                    logger.error("damaged checkpoint: %s", problem)
        if shared[0]:
            raise CheckpointError(f"{self._directory}: all {len(shared[0])} checkpoints are damaged")
        return None

    def load(self, checkpoint: Path, model: ShardedState, optimizer: ShardedState) -> Loaded:
        """Load a training checkpoint into this rank's shards, at any layout.

        Raises:
            CheckpointError: not a training checkpoint, of another stage or model, or it holds more than data.
        """
        manifest = read_manifest(checkpoint)
        if manifest.kind != "training" or manifest.origin != self._config.stage:
            found = f"{manifest.kind} of {manifest.origin}"
            raise CheckpointError(f"{checkpoint}: expected training of {self._config.stage}, found {found}")
        if differences := model_differences(manifest.model, self._config.model):
            raise CheckpointError(f"{checkpoint}: another model: " + "; ".join(differences))
        return Loaded(
            manifest,
            load_folder(model, checkpoint / MODEL_FOLDER),
            load_folder(optimizer, checkpoint / OPTIMIZER_FOLDER),
        )

    def _manifest(self, pending: _Pending, files: dict[str, Any]) -> Manifest:
        config = self._config
        parallel = config.parallel
        world = dist.get_world_size()
        return Manifest(
            kind="training",
            origin=config.stage,
            step=pending.step,
            recipe=config.name,
            image_size=config.data.image_size,
            model=config.model,
            layout={
                "tensor": parallel.tensor,
                "pipeline": parallel.pipeline,
                "data": world // (parallel.tensor * parallel.pipeline),
            },
            progress=pending.progress,
            files=files,
        )

    def _aside(self, step: int) -> Path:
        return self._directory / f"step_{step:08d}.tmp"

    @staticmethod
    def _make_folders(aside: Path) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / MODEL_FOLDER).mkdir(parents=True)
        (aside / OPTIMIZER_FOLDER).mkdir()

    def _publish(self, aside: Path, manifest: Manifest) -> None:
        write_manifest(aside, manifest)
        final = aside.with_suffix("")
        if final.exists():  # the step was saved before, perhaps damaged: the new one takes its place
            shutil.rmtree(final.with_suffix(".old"), ignore_errors=True)
            final.rename(final.with_suffix(".old"))
        aside.rename(final)
        sync_directory(self._directory)
        replace_bytes(self._directory / POINTER_NAME, f"{final.name}\n".encode())
        shutil.rmtree(final.with_suffix(".old"), ignore_errors=True)
        self._retire(manifest.step)

    def _retire(self, newest: int) -> None:
        """Of the checkpoints up to `newest`, remove all but the last `keep_last` and those of `keep_every`.

        Later steps, left from before a fall-back to an older checkpoint, are replaced when they are reached.
        """
        steps = {int(path.name.removeprefix("step_")): path for path in self._candidates()}
        for step in sorted((step for step in steps if step <= newest), reverse=True)[self._keep_last :]:
            if self._keep_every and step % self._keep_every == 0:
                continue
            condemned = steps[step].with_suffix(".tmp")  # a half-removed checkpoint must not look like one
            steps[step].rename(condemned)
            shutil.rmtree(condemned, ignore_errors=True)

    def _candidates(self) -> list[Path]:
        """Complete checkpoints from new to old. The pointer is for people and tools: a crash may have left it one
        checkpoint behind."""
        steps = (path for path in self._directory.glob("step_*") if _STEP_NAME.match(path.name))
        return sorted(steps, reverse=True)

    def _tidy(self) -> None:
        """Remove what an interrupted run left behind."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for leftover in self._directory.glob("step_*.tmp"):
            shutil.rmtree(leftover)
        for replaced in self._directory.glob("step_*.old"):
            if replaced.with_suffix("").exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(replaced.with_suffix(""))

    def _discard(self, aside: Path) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)

    @staticmethod
    def _on_main(action: Callable[[], object], what: str) -> None:
        agree(attempt(action) if dist.get_rank() == 0 else None, what)


def _write_all(folders: dict[str, FolderSave]) -> Exception | None:
    def write() -> None:
        for folder in folders.values():
            folder.write()

    return attempt(write)
