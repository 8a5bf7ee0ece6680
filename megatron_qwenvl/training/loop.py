"""The training loop of one stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer

from megatron_qwenvl.batch import Batch
from megatron_qwenvl.checkpoint.run.manager import CheckpointManager, SaveReport
from megatron_qwenvl.checkpoint.run.owner import (
    Hold,
    OwnershipLost,
    RunOwner,
    refused_if_owned,
    released_on_error,
    take_together,
)
from megatron_qwenvl.checkpoint.run.rewind import Rewind
from megatron_qwenvl.checkpoint.run.weights import model_state
from megatron_qwenvl.checkpoint.storage.files import CheckpointError
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.loading.loader import Step, StepLoader
from megatron_qwenvl.data.sampling.history_file import RECORD_NAME, encode_history
from megatron_qwenvl.engine.optimizer import optimizer_state, set_update_count
from megatron_qwenvl.engine.start import Runtime
from megatron_qwenvl.model.build import build_stage
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.runtime.interrupt import StopRequest
from megatron_qwenvl.runtime.retry import reads
from megatron_qwenvl.runtime.watchdog import Watchdog

from .errors import TrainingError
from .metrics import MetricsLog, StepCost, mfu_reference, start_record, step_metrics
from .optimizer import Schedule, build_optimizer
from .progress import Progress
from .run_directory import check_run_directory, record_start
from .setup import announce, first_weights, make_loaders, resume, set_aside_newer
from .step import StepReport, StepRunner
from .unreadable import UnreadableShards, too_many, worst_shards

logger = logging.getLogger(__name__)


@dataclass
class Trainer:
    """One training stage on this rank, from its start or from its newest checkpoint to its end."""

    config: RunConfig
    runtime: Runtime
    runner: StepRunner
    optimizer: MegatronOptimizer
    schedule: Schedule
    checkpoints: CheckpointManager
    loader: StepLoader
    validation: StepLoader | None
    metrics: MetricsLog
    progress: Progress
    stop: StopRequest
    watchdog: Watchdog
    owner: RunOwner
    hold: Hold
    unreadable: UnreadableShards = field(default_factory=UnreadableShards)
    rewind: Rewind | None = None
    """How the run went back to an older checkpoint, if it did."""
    interrupted: bool = False
    """The run was asked to stop before its end, and did."""
    _saved_step: int = field(default=-1)
    _repeated_reads: int = 0
    """On this rank, since the last record."""

    @classmethod
    def build(
        cls,
        config: RunConfig,
        runtime: Runtime,
        stop: StopRequest | None = None,
        from_step: int | None = None,
    ) -> Trainer:
        """Set the stage up: partition, model, data, optimizer, and the state of the newest checkpoint.

        Args:
            config: the run.
            runtime: this rank's place in it.
            stop: asks the run to save and stop before its end; none: nothing does.
            from_step: go on from the checkpoint of this step and set newer ones aside; none: from the newest one.

        Raises:
            CheckpointError: no usable checkpoint where one is needed.
            DataError: data that does not fit the configuration.
        """
        partition = make_partition(config, runtime.data_size)
        if runtime.is_main:
            announce(config, partition.describe())
        folder = Path(config.run_dir)
        checkpoints = CheckpointManager(folder / "checkpoints", config)
        checkpoints.ranks.run_on_rank0(lambda: reads(folder, lambda: check_run_directory(folder)), "refused")
        owner = RunOwner(folder, 60 * config.runtime.takeover_minutes)
        checkpoints.ranks.run_on_rank0(lambda: reads(folder, owner.wait_until_free), "refused")
        with refused_if_owned(owner, checkpoints.ranks):
            stage = build_stage(config, runtime, partition)
            older = None if from_step is None else checkpoints.rewind_to(from_step)
            newest = older or checkpoints.latest()
            if newest is None:
                checkpoints.published = first_weights(config, runtime, stage, checkpoints.ranks)
            runner = StepRunner.build(config, runtime, partition, stage)
            optimizer = build_optimizer(runner.model, config)
            progress = (
                Progress() if newest is None else resume(newest, checkpoints, stage, optimizer, runtime)
            )
            loader, validation = make_loaders(
                config, runtime, stage, newest, progress.step, checkpoints.ranks
            )
        # Whatever can refuse to start has done so: from here on the run directory is written to, by its one owner.
        hold = take_together(owner, checkpoints.ranks)
        with released_on_error(owner):
            checkpoints.prepare(lambda: reads(folder, hold.check))
            checkpoints.ranks.run_on_rank0(
                lambda: reads(folder, lambda: record_start(config, runtime.process)),
                f"{folder}: the start cannot be recorded",
            )
            rewind = set_aside_newer(checkpoints, progress.step) if older else None
            metrics = MetricsLog(config, runtime.is_main, progress.step, hold.check)
        return cls(
            config=config,
            runtime=runtime,
            runner=runner,
            optimizer=optimizer,
            schedule=Schedule(optimizer, config),
            checkpoints=checkpoints,
            loader=loader,
            validation=validation,
            metrics=metrics,
            progress=progress,
            stop=stop or StopRequest(),
            watchdog=Watchdog(
                60 * config.runtime.hang_minutes, Path(config.run_dir) / "stacks", runtime.process.rank
            ),
            owner=owner,
            hold=hold,
            rewind=rewind,
            _saved_step=-1 if newest is None else progress.step,
        )

    def run(self) -> Progress:
        """Train to the configured end, or to the step after a request to stop; returns the final counters.

        Raises:
            TrainingError: too many steps in a row, or all, without a supervised token, or without a finite loss and
                gradient.
            DataError: a shard cannot be read, or too many samples.
            CheckpointError: a checkpoint could not be saved; of the last one also where failures do not stop a run.
        """
        if self.rewind:
            self.metrics.event("rewind", step=self.rewind.to_step, **asdict(self.rewind))
        self.metrics.event("start", **start_record(self.config, self.runtime, self.progress.step))
        self.runtime.reset_peak_memory()  # what setting up took is not what training takes
        self.watchdog.start()
        try:
            if not self._asked_to_stop():
                self.stop.started()
                self._train_steps()
                self._check_result()
            self._finish()
        except (DataError, TrainingError):
            self._keep_last_save()
            raise
        finally:
            self.watchdog.stop()
            self.metrics.close()
            self.owner.release()
        return self.progress

    def _train_steps(self) -> None:
        for batches, waited, began in self._steps():
            report = self._train(batches, waited, began)
            self._guard(report)
            self._report_save(self.checkpoints.poll)
            if self._asked_to_stop():
                return
            if self._due(self.config.train.validation_interval):
                self._validate()
            if self._due(self.config.checkpoint.interval):
                self._save()

    def _asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop before the last step; every rank answers alike. Collective."""
        if self.progress.step >= self._last_step or not self.runtime.any_rank(self.stop.received()):
            return False
        self.interrupted = True
        if self.runtime.is_main:
            why = self.stop.name or "a signal to another rank"
            then = "nothing to save" if self._is_saved else "saving"
            logger.info("step %d: asked to stop (%s): %s", self.progress.step, why, then)
        return True

    @property
    def _last_step(self) -> int:
        return min(self.config.train.steps, self.config.train.stop_after or self.config.train.steps)

    @property
    def _is_saved(self) -> bool:
        """Whether there is nothing to lose: the newest checkpoint is of this step, or there has been no step yet."""
        return self.progress.step in (0, self._saved_step)

    def _finish(self) -> None:
        """Make sure that the last step is saved; a run whose result is lost does not end well."""
        self._report_save(self.checkpoints.wait)
        if not self.config.checkpoint.save or self._is_saved:
            return
        self._save()
        self._report_save(self.checkpoints.wait)
        if not self._is_saved:
            raise CheckpointError(
                f"step {self.progress.step}: the last checkpoint of the run could not be saved"
            )

    def _steps(self) -> Iterator[tuple[list[Batch], float, float]]:
        """Micro-batches of every step still to do, the time waited for them and the time the step began."""
        if self.progress.step >= self._last_step:
            return
        began = self._begin_step()
        for step in self.loader:
            batches = list(step)
            self._name_skipped(step, batches)
            self._tell_repeated_reads(batches)
            yield batches, time.monotonic() - began, began
            if self.progress.step >= self._last_step:
                return
            began = self._begin_step()

    def _begin_step(self) -> float:
        """The time at which the next step begins."""
        self.watchdog.alive(f"step {self.progress.step + 1}")
        return time.monotonic()

    def _train(self, batches: list[Batch], waited: float, began: float) -> StepReport:
        step = self.progress.step
        lr = self.schedule.set_step(step)
        report = self.runner.train(batches, self.optimizer)
        self.progress = self.progress.after(report, self.config.data.unreadable_window)
        self.unreadable.add(self.progress.recent_unreadable, self.progress.samples, batches)
        self.runtime.synchronize()
        self._check_hold()
        if self.metrics.due(step, report.applied):
            self._record(report, step, waited, began, lr)
        return report

    def _check_hold(self) -> None:
        """End on every rank once another start has taken the run over. Collective."""
        if self.runtime.any_rank(self.runtime.is_main and self.hold.is_lost()):
            self.hold.check()
            raise OwnershipLost(f"{self.config.run_dir}: the run was taken over by another start")

    def _record(self, report: StepReport, step: int, waited: float, began: float, lr: float) -> None:
        """Log a step with what it took on the rank that took most."""
        longest, peak = self.runtime.all_max([waited, self.runtime.peak_memory_bytes()])
        self.runtime.reset_peak_memory()
        repeated = self.runtime.sum_ranks(self._repeated_reads)
        self._repeated_reads = 0
        cost = StepCost(time.monotonic() - began, longest, int(peak), repeated)
        world, reference = self.runtime.process.world_size, mfu_reference(self.config, self.runtime)
        self.metrics.train(step_metrics(self.config, report, cost, step, lr, world, reference))

    def _guard(self, report: StepReport) -> None:
        """End a run that does not learn, or only from a part of its data; every rank decides the same."""
        limit, data = self.config.train.max_skipped_steps, self.config.data
        if self.progress.skipped_in_a_row > limit:
            raise TrainingError(
                f"step {self.progress.step}: {self._why_skipped(report)}; no update for "
                f"{self.progress.skipped_in_a_row} steps in a row (train.max_skipped_steps {limit})"
            )
        window, recent = data.unreadable_window, self.progress.recent_unreadable
        if too_many(recent, report.samples, window, data.max_unreadable_share):
            count, newest = sum(count for _, count in recent), max(window, report.samples)
            raise DataError(
                f"step {self.progress.step}: {count} of the newest {min(newest, self.progress.samples)} samples could "
                f"not be read; data.max_unreadable_share {data.max_unreadable_share} allows "
                f"{int(data.max_unreadable_share * newest)}{self._worst_shards()}"
            )

    def _check_result(self) -> None:
        if self.progress.step == self.config.train.steps and not self.progress.updates:
            raise TrainingError(
                f"step {self.progress.step}: the run has ended without a step that was applied"
            )

    def _why_skipped(self, report: StepReport) -> str:
        if report.loss_tokens:
            return f"loss {report.loss} and gradient norm {report.grad_norm} are not finite"
        unreadable = f"{report.skipped_samples} of its {report.samples} samples could not be read"
        return f"no supervised token: {unreadable}{self._worst_shards()}"

    def _worst_shards(self) -> str:
        """The end of a message. Collective."""
        worst = worst_shards(self.checkpoints.ranks.all_gather(self.unreadable.found))
        return f"; worst shards since this start: {worst}" if worst else ""

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.progress.step % interval == 0

    def _validate(self) -> None:
        if self.validation is not None:
            self.watchdog.alive(f"the validation after step {self.progress.step}")
            for step in self.validation:
                self.metrics.validation(self.progress.step, self.runner.evaluate(list(step)))

    def _save(self) -> None:
        if not self.config.checkpoint.save:
            return
        self._report_save(self.checkpoints.wait)  # the save before may still be going on in the background
        began = time.monotonic()
        set_update_count(self.optimizer, self.progress.updates)
        with self._patience():
            model = model_state(self.runner.model.module)
            optimizer = optimizer_state(self.optimizer, model)
        step, progress = self.progress.step, asdict(self.progress)
        data = (
            {RECORD_NAME: encode_history(self.loader.sampler.history, step)} if self.runtime.is_main else {}
        )
        self._report_save(lambda: self.checkpoints.save(step, model, optimizer, progress, began, data))

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """A save, or its completion, may take longer than a step before the run counts as hanging."""
        step = self.progress.step
        self.watchdog.alive(f"the save at step {step}", 60 * self.config.checkpoint.timeout_minutes)
        try:
            yield
        finally:
            self.watchdog.alive(f"what follows step {step}")

    def _keep_last_save(self) -> None:
        """Complete the save that is still going on when the run ends by an error, if all ranks have that error."""
        try:
            self._report_save(self.checkpoints.wait_if_all_come)
        except CheckpointError as error:
            logger.error("checkpoint not saved: %s", error)

    def _report_save(self, action: Callable[[], SaveReport | None]) -> None:
        """Do something with checkpoints and tell what was saved; a failed save stops the run if so configured.

        The manager lets every rank know of every failure, so all of them go on or stop alike.
        """
        try:
            with self._patience():
                saved = action()
        except CheckpointError as error:
            if self.config.checkpoint.on_failure == "stop":
                raise
            if self.runtime.is_main:
                logger.error("checkpoint not saved, going on: %s", error)
            self.metrics.event("save_failed", step=self.progress.step, reason=str(error))
            return
        if saved is None:
            return
        self._saved_step = saved.step
        if self.runtime.is_main:
            self.metrics.event(
                "save",
                step=saved.step,
                seconds=saved.total_seconds,
                stall=saved.stall_seconds,
                bytes=saved.bytes,
            )
            logger.info(
                "step %d saved: %.1f MB in %.1f s, training stood still for %.1f s",
                saved.step,
                saved.bytes / 1e6,
                saved.total_seconds,
                saved.stall_seconds,
            )

    def _tell_repeated_reads(self, batches: list[Batch]) -> None:
        """One line for all reads of a step's data that worked only when they were repeated, here or in a worker."""
        told = [line for batch in batches for line in batch.read_again] + list(reads.take())
        if told:
            more = f" and {len(told) - 1} more" if len(told) > 1 else ""
            logger.warning(
                "step %d: the file system refused reads: %s%s", self.progress.step + 1, told[0], more
            )
        self._repeated_reads += len(told)

    def _name_skipped(self, step: Step, batches: list[Batch]) -> None:
        if self.runtime.is_main:
            for skipped in step.info.skipped:
                logger.warning("step %d: sample left out: %s", step.info.step + 1, skipped)
        if self.runtime.tensor_rank == 0:
            for reason in (reason for batch in batches for reason in batch.bad_reasons):
                logger.warning("step %d: loss of an unreadable sample masked: %s", step.info.step + 1, reason)
