"""Saving of checkpoints during a run: start, completion and report of each save."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from megatron.core.optimizer import MegatronOptimizer

from megatron_qwenvl.checkpoint.run.manager import CheckpointManager
from megatron_qwenvl.checkpoint.run.saving import SaveReport
from megatron_qwenvl.checkpoint.run.weights import ModelChunk, model_state
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.config.schema import CheckpointConfig
from megatron_qwenvl.data.sampling.history import DataHistory
from megatron_qwenvl.data.sampling.history_file import DATA_RECORD_NAME, encode_history
from megatron_qwenvl.engine.optimizer import optimizer_state, set_update_count
from megatron_qwenvl.runtime.watchdog import Watchdog

from .metrics import MetricsLog
from .progress import Progress

logger = logging.getLogger(__name__)


class RunSaver:
    """Saver of the checkpoints of a run. All methods are collective.

    `checkpoint.on_failure` decides whether a failed save ends the run. The manager reports every failure to every
    rank, so all of them continue or end together.

    Args:
        settings: the section `checkpoint` of the configuration.
        checkpoints: manager of the run's checkpoints.
        metrics: records the saves.
        watchdog: gets a longer limit during a save.
        saved_step: step of the checkpoint that the run resumes from; -1: none.
    """

    def __init__(
        self,
        settings: CheckpointConfig,
        checkpoints: CheckpointManager,
        metrics: MetricsLog,
        watchdog: Watchdog,
        saved_step: int,
    ) -> None:
        self._settings = settings
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._watchdog = watchdog
        self.saved_step = saved_step
        """Step of the newest complete checkpoint; -1: none."""

    def is_saved(self, step: int) -> bool:
        """Return whether the newest checkpoint is of this step, or there has been no step yet."""
        return step in (0, self.saved_step)

    def save(
        self, progress: Progress, model: ModelChunk, optimizer: MegatronOptimizer, history: DataHistory
    ) -> None:
        """Save a checkpoint, or start the save if files are written in the background.

        Args:
            progress: counters of the run.
            model: this rank's part of the model.
            optimizer: its optimizer.
            history: record of the run's data up to this step.

        Raises:
            CheckpointError: this or the previous save failed, and failures end the run.
        """
        if not self._settings.save:
            return
        step = progress.step
        self.wait(step)  # the previous save may still be writing in the background
        began = time.monotonic()
        set_update_count(optimizer, progress.updates)
        with self._extended_hang_limit(step):
            weights = model_state(model)
            state = optimizer_state(optimizer, weights)
        beside = {DATA_RECORD_NAME: encode_history(history, step)} if self._checkpoints.ranks.is_rank0 else {}
        self._report(
            step, lambda: self._checkpoints.save(step, weights, state, asdict(progress), began, beside)
        )

    def poll(self, step: int) -> None:
        """Complete the background save if every rank has written its files; returns at once otherwise."""
        self._report(step, self._checkpoints.poll)

    def wait(self, step: int) -> None:
        """Complete the background save, if there is one."""
        self._report(step, self._checkpoints.wait)

    def finish_background_save(self, step: int) -> None:
        """Complete the background save when the run ends with an error, if all ranks have that error."""
        try:
            self._report(step, self._checkpoints.wait_if_all_arrive)
        except CheckpointError as error:
            logger.error("checkpoint not saved: %s", error)

    def check_last_save(self, step: int) -> None:
        """Check that the last step was saved: a run whose result is lost ends with an error.

        Raises:
            CheckpointError: it was not saved.
        """
        if self._settings.save and not self.is_saved(step):
            raise CheckpointError(f"step {step}: the last checkpoint of the run could not be saved")

    @contextmanager
    def _extended_hang_limit(self, step: int) -> Iterator[None]:
        """Extend the hang limit of the watchdog during a save or its completion."""
        self._watchdog.alive(f"the save at step {step}", 60 * self._settings.timeout_minutes)
        try:
            yield
        finally:
            self._watchdog.alive(f"what follows step {step}")

    def _report(self, step: int, action: Callable[[], SaveReport | None]) -> None:
        """Run an action of the checkpoint manager and report what it saved, or its failure."""
        try:
            with self._extended_hang_limit(step):
                saved = action()
        except CheckpointError as error:
            if self._settings.on_failure == "stop":
                raise
            if self._checkpoints.ranks.is_rank0:
                logger.error("checkpoint not saved, going on: %s", error)
            self._metrics.event("save_failed", step=step, reason=str(error))
            return
        if saved is not None:
            self.saved_step = saved.step
            self._log_saved(saved)

    def _log_saved(self, saved: SaveReport) -> None:
        seconds, stall = saved.total_seconds, saved.stall_seconds
        self._metrics.event("save", step=saved.step, seconds=seconds, stall=stall, bytes=saved.bytes)
        if self._checkpoints.ranks.is_rank0:
            logger.info(
                "step %d saved: %.1f MB in %.1f s, training stood still for %.1f s",
                saved.step,
                saved.bytes / 1e6,
                seconds,
                stall,
            )
