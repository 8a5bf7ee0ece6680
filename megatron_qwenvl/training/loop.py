"""Training loop of one training stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer

from megatron_qwenvl.batch import Batch
from megatron_qwenvl.checkpoint.run.owner import Hold, OwnershipLost, RunOwner
from megatron_qwenvl.checkpoint.run.ranks import Ranks
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.loading.loader import StepLoader
from megatron_qwenvl.engine.start import Runtime
from megatron_qwenvl.runtime.stop_signals import StopRequest
from megatron_qwenvl.runtime.watchdog import Watchdog

from .data_log import DataLog
from .errors import TrainingError
from .limits import check_limits, check_result
from .metrics import MetricsLog, StepCost, mfu_reference, start_record, step_metrics
from .optimizer import Schedule
from .progress import Progress
from .saving import RunSaver
from .setup import prepare_run, take_over_run
from .step import StepReport, StepRunner
from .unreadable import UnreadableShards, worst_shards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepData:
    """Data of one step on this rank."""

    batches: list[Batch]
    """Micro-batches."""
    began: float
    """Start of the step, by `time.monotonic`."""
    waited: float
    """Seconds from then until the data was loaded."""


@dataclass
class Trainer:
    """One training stage on this rank, from its start or from its newest checkpoint to its end."""

    config: RunConfig
    runtime: Runtime
    ranks: Ranks
    runner: StepRunner
    optimizer: MegatronOptimizer
    schedule: Schedule
    loader: StepLoader
    validation: StepLoader | None
    saver: RunSaver
    metrics: MetricsLog
    data_log: DataLog
    progress: Progress
    stop: StopRequest
    watchdog: Watchdog
    owner: RunOwner
    hold: Hold
    unreadable: UnreadableShards = field(default_factory=UnreadableShards)
    interrupted: bool = False
    """Whether the run stopped before its end on request."""

    @classmethod
    def build(
        cls,
        config: RunConfig,
        runtime: Runtime,
        stop: StopRequest | None = None,
        from_step: int | None = None,
    ) -> Trainer:
        """Set the training stage up: partition, model, data, optimizer, and the state of the newest checkpoint.

        Args:
            config: configuration of the run.
            runtime: devices and process groups of this rank.
            stop: request to save and stop before the end; None: there will be none.
            from_step: resume from the checkpoint of this step and move newer ones away; None: from the newest one.

        Raises:
            CheckpointError, DataError: as `prepare_run` and `take_over_run`.
        """
        run = prepare_run(config, runtime, from_step)
        hold, metrics = take_over_run(config, runtime, run)
        stacks = Path(config.run_dir) / "stacks"
        watchdog = Watchdog(60 * config.runtime.hang_minutes, stacks, runtime.process.rank)
        return cls(
            config=config,
            runtime=runtime,
            ranks=run.checkpoints.ranks,
            runner=run.runner,
            optimizer=run.optimizer,
            schedule=Schedule(run.optimizer, config),
            loader=run.loader,
            validation=run.validation,
            saver=RunSaver(config.checkpoint, run.checkpoints, metrics, watchdog, run.saved_step),
            metrics=metrics,
            data_log=DataLog(runtime),
            progress=run.progress,
            stop=stop or StopRequest(),
            watchdog=watchdog,
            owner=run.owner,
            hold=hold,
        )

    def run(self) -> Progress:
        """Train to the configured end, or to the step after a request to stop; returns the final counters.

        Raises:
            TrainingError: too many consecutive steps, or all, without a supervised token or without a finite loss and
                gradient.
            DataError: a shard cannot be read, or too many samples cannot.
            CheckpointError: a checkpoint could not be saved; for the last one also if `checkpoint.on_failure` is
                `continue`.
        """
        with self._watched():
            if not self._asked_to_stop():
                self.stop.started()
                self._train_steps()
                check_result(self.config, self.progress)
            self._save_last()
        return self.progress

    def _train_steps(self) -> None:
        for data in self._steps():
            report = self._train(data)
            check_limits(self.config, self.progress, report, self._worst_shards)
            self.saver.poll(self.progress.step)
            if self._asked_to_stop():
                return
            if self._due(self.config.train.validation_interval):
                self._validate()
            if self._due(self.config.checkpoint.interval):
                self._save()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Record the start and watch the run; release the ownership of its directory at the end in any case."""
        self.metrics.event("start", **start_record(self.config, self.runtime, self.progress.step))
        self.runtime.reset_peak_memory()  # the peak of the set-up is not that of training
        self.watchdog.start()
        try:
            yield
        except (DataError, TrainingError):
            self.saver.finish_background_save(self.progress.step)
            raise
        finally:
            self.watchdog.stop()
            self.metrics.close()
            self.owner.release()

    @property
    def _last_step(self) -> int:
        return min(self.config.train.steps, self.config.train.stop_after or self.config.train.steps)

    def _steps(self) -> Iterator[StepData]:
        """Load the data of every remaining step."""
        if self.progress.step >= self._last_step:
            return
        began = self._begin_step()
        for step in self.loader:
            batches = list(step)
            waited = time.monotonic() - began
            self.data_log.log_step(step, batches)
            yield StepData(batches, began, waited)
            if self.progress.step >= self._last_step:
                return
            began = self._begin_step()

    def _begin_step(self) -> float:
        """Return the time at which the next step begins."""
        self.watchdog.alive(f"step {self.progress.step + 1}")
        return time.monotonic()

    def _train(self, data: StepData) -> StepReport:
        step = self.progress.step
        lr = self.schedule.set_step(step)
        report = self.runner.train(data.batches, self.optimizer)
        self.progress = self.progress.after(report, self.config.data.unreadable_window)
        self.unreadable.add(self.progress.recent_unreadable, self.progress.samples, data.batches)
        self.runtime.synchronize()
        self._check_hold()
        if self.metrics.due(step, report.applied):
            self._record(report, step, data, lr)
        return report

    def _check_hold(self) -> None:
        """Raise on every rank if another start has taken the run over. Collective."""
        if self.runtime.any_rank(self.runtime.is_rank0 and self.hold.is_lost()):
            self.hold.check()
            raise OwnershipLost(f"{self.config.run_dir}: the run was taken over by another start")

    def _record(self, report: StepReport, step: int, data: StepData, lr: float) -> None:
        """Log a step with the largest time, data wait and peak memory of all ranks."""
        seconds, longest, peak = self.runtime.all_max(
            [time.monotonic() - data.began, data.waited, self.runtime.peak_memory_bytes()]
        )
        self.runtime.reset_peak_memory()
        repeated = self.data_log.take_repeated_reads()
        cost = StepCost(seconds, longest, int(peak), repeated)
        world, reference = self.runtime.process.world_size, mfu_reference(self.config, self.runtime)
        self.metrics.train(step_metrics(self.config, report, cost, step, lr, world, reference))

    def _asked_to_stop(self) -> bool:
        """Return whether any rank was asked to stop before the last step; the same on every rank. Collective."""
        if self.progress.step >= self._last_step or not self.runtime.any_rank(self.stop.received()):
            return False
        self.interrupted = True
        if self.runtime.is_rank0:
            why = self.stop.name or "a signal to another rank"
            then = "nothing to save" if self.saver.is_saved(self.progress.step) else "saving"
            logger.info("step %d: asked to stop (%s): %s", self.progress.step, why, then)
        return True

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.progress.step % interval == 0

    def _validate(self) -> None:
        if self.validation is not None:
            self.watchdog.alive(f"the validation after step {self.progress.step}")
            for step in self.validation:
                self.metrics.validation(self.progress.step, self.runner.evaluate(list(step)))

    def _save(self) -> None:
        history = self.loader.sampler.history
        self.saver.save(self.progress, self.runner.model.module, self.optimizer, history)

    def _save_last(self) -> None:
        """Complete a save in the background, and save the last step if it is not saved yet."""
        step = self.progress.step
        self.saver.wait(step)
        if not self.saver.is_saved(step):
            self._save()
            self.saver.wait(step)
        self.saver.check_last_save(step)

    def _worst_shards(self) -> str:
        """Describe the shards with most unreadable samples, as the end of a message. Collective."""
        worst = worst_shards(self.ranks.all_gather(self.unreadable.found))
        return f"; worst shards since this start: {worst}" if worst else ""
