"""The training loop of one stage."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core.optimizer import MegatronOptimizer

from megatron_qwenvl.checkpoint.collective import Peers
from megatron_qwenvl.checkpoint.files import CheckpointError
from megatron_qwenvl.checkpoint.manager import CheckpointManager, SaveReport
from megatron_qwenvl.checkpoint.weights import OPTIMIZER_METADATA, fill_model, load_weights, model_state
from megatron_qwenvl.config.load import dump_yaml
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.batch import Batch, DataNeeds
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.loader import Step, StepLoader, build_loader
from megatron_qwenvl.data.tokenizer import load_tokenizer
from megatron_qwenvl.model.build import build_stage, initialize_weights
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.model.shapes import describe_parameters
from megatron_qwenvl.model.stage import QwenVLStage
from megatron_qwenvl.runtime.engine import Runtime
from megatron_qwenvl.runtime.environment import describe_environment
from megatron_qwenvl.runtime.interrupt import StopRequest
from megatron_qwenvl.runtime.watchdog import Watchdog

from .errors import TrainingError
from .metrics import MetricsLog, StepCost, mfu_reference, start_record, step_metrics
from .optimizer import Schedule, build_optimizer, restore_optimizer
from .step import StepReport, StepRunner

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Counters of a run; saved with every checkpoint."""

    step: int = 0
    """Steps done, skipped ones included."""
    samples: int = 0
    """Samples seen."""
    skipped_steps: int = 0
    """Steps without an update because the loss or the gradient was not finite."""
    skipped_in_a_row: int = 0
    """The same, since the last update."""
    unreadable_samples: int = 0
    """Samples whose loss was masked because they could not be read."""

    @property
    def updates(self) -> int:
        """Optimizer updates made."""
        return self.step - self.skipped_steps

    def after(self, report: StepReport) -> Progress:
        """Counters after one more step."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + report.samples,
            skipped_steps=self.skipped_steps + (not report.applied),
            skipped_in_a_row=0 if report.applied else self.skipped_in_a_row + 1,
            unreadable_samples=self.unreadable_samples + report.skipped_samples,
        )


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
    interrupted: bool = False
    """The run was asked to stop before its end, and did."""
    _saved_step: int = field(default=-1)

    @classmethod
    def build(cls, config: RunConfig, runtime: Runtime, stop: StopRequest | None = None) -> Trainer:
        """Set the stage up: partition, model, data, optimizer, and the state of the newest checkpoint.

        Args:
            config: the run.
            runtime: this rank's place in it.
            stop: asks the run to save and stop before its end; none: nothing does.

        Raises:
            CheckpointError: no usable checkpoint where one is needed.
            DataError: data that does not fit the configuration.
        """
        partition = make_partition(config, runtime.data_size)
        _announce(config, runtime, partition.describe())
        stage = build_stage(config, runtime, partition)
        checkpoints = CheckpointManager(
            Path(config.run_dir) / "checkpoints",
            config,
            keep_every=config.checkpoint.keep_every,
            asynchronous=config.checkpoint.asynchronous,
        )
        newest = checkpoints.latest()
        if newest is None:
            _first_weights(config, runtime, stage, checkpoints.peers)
        runner = StepRunner.build(config, runtime, partition, stage)
        optimizer = build_optimizer(runner.model, config)
        progress = Progress() if newest is None else _resume(newest, checkpoints, stage, optimizer, runtime)
        loader, validation = _loaders(config, runtime, stage, progress.step)
        return cls(
            config=config,
            runtime=runtime,
            runner=runner,
            optimizer=optimizer,
            schedule=Schedule(optimizer, config),
            checkpoints=checkpoints,
            loader=loader,
            validation=validation,
            metrics=MetricsLog(config, runtime.is_main, progress.step),
            progress=progress,
            stop=stop or StopRequest(),
            watchdog=Watchdog(
                60 * config.runtime.hang_minutes, Path(config.run_dir) / "stacks", runtime.process.rank
            ),
            _saved_step=-1 if newest is None else progress.step,
        )

    def run(self) -> Progress:
        """Train to the configured end, or to the step after a request to stop; returns the final counters.

        Raises:
            TrainingError: too many steps in a row without a finite loss and gradient.
            DataError: a shard cannot be read.
            CheckpointError: a checkpoint could not be saved; of the last one also where failures do not stop a run.
        """
        self.metrics.event("start", **start_record(self.config, self.runtime, self.progress.step))
        self.runtime.reset_peak_memory()  # what setting up took is not what training takes
        self.watchdog.start()
        try:
            if not self._asked_to_stop():
                self._train_steps()
            self._finish()
        except (DataError, TrainingError):
            self._keep_last_save()
            raise
        finally:
            self.watchdog.stop()
            self.metrics.close()
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
        if self.progress.step >= self._last_step or not self.runtime.any_rank(self.stop.received):
            return False
        self.interrupted = True
        if self.runtime.is_main:
            why = self.stop.name or "a signal to another rank"
            logger.info("step %d: asked to stop (%s): saving", self.progress.step, why)
        return True

    @property
    def _last_step(self) -> int:
        return min(self.config.train.steps, self.config.train.stop_after or self.config.train.steps)

    def _finish(self) -> None:
        """Make sure that the last step is saved; a run whose result is lost does not end well."""
        self._report_save(self.checkpoints.wait)
        if not self.config.checkpoint.save:
            return
        if self._saved_step != self.progress.step:
            self._save()
            self._report_save(self.checkpoints.wait)
        if self._saved_step != self.progress.step:
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
        self.progress = self.progress.after(report)
        self.runtime.synchronize()
        if self.metrics.due(step, report.applied):
            self._record(report, step, waited, began, lr)
        return report

    def _record(self, report: StepReport, step: int, waited: float, began: float, lr: float) -> None:
        """Log a step with what it took on the rank that took most."""
        longest, peak = self.runtime.all_max([waited, self.runtime.peak_memory_bytes()])
        self.runtime.reset_peak_memory()
        cost = StepCost(time.monotonic() - began, longest, int(peak))
        world, reference = self.runtime.process.world_size, mfu_reference(self.config, self.runtime)
        self.metrics.train(step_metrics(self.config, report, cost, step, lr, world, reference))

    def _guard(self, report: StepReport) -> None:
        limit = self.config.train.max_skipped_steps
        if self.progress.skipped_in_a_row > limit:
            raise TrainingError(
                f"step {self.progress.step}: loss {report.loss} and gradient norm {report.grad_norm} are not finite, "
                f"for {self.progress.skipped_in_a_row} steps in a row (train.max_skipped_steps {limit})"
            )

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
        # Fused optimizers do not count steps in groups without parameters, and rank 0's count is what is saved.
        for group in self.optimizer.param_groups:
            group["step"] = self.progress.updates
        with self._patience():
            model = model_state(self.runner.model.module)
            optimizer = self.optimizer.sharded_state_dict(model, metadata=dict(OPTIMIZER_METADATA))
        step, progress = self.progress.step, asdict(self.progress)
        self._report_save(lambda: self.checkpoints.save(step, model, optimizer, progress, began))

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

    def _name_skipped(self, step: Step, batches: list[Batch]) -> None:
        if self.runtime.is_main:
            for skipped in step.info.skipped:
                logger.warning("step %d: sample left out: %s", step.info.step + 1, skipped)
        if self.runtime.tensor_rank == 0:
            for reason in (reason for batch in batches for reason in batch.bad_reasons):
                logger.warning("step %d: loss of an unreadable sample masked: %s", step.info.step + 1, reason)


def _announce(config: RunConfig, runtime: Runtime, partition: str) -> None:
    if not runtime.is_main:
        return
    logger.info("run %s (%s) in %s", config.name, config.stage, config.run_dir)
    logger.info(describe_parameters(config))
    for line in partition.splitlines():
        logger.info(line)
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _note_changes(folder / "config.yaml", config)
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    environment = folder / "environment" / f"{time.strftime('%Y%m%dT%H%M%S')}.json"  # one per start
    environment.parent.mkdir(exist_ok=True)
    described = describe_environment(runtime.process).to_json()
    environment.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _note_changes(earlier: Path, config: RunConfig) -> None:
    """Say in what a run that is started again differs from before, layout and machine aside."""
    if not earlier.is_file():
        return
    apart = {"parallel", "runtime", "logging"}
    before, now = yaml.safe_load(earlier.read_text(encoding="utf-8")), yaml.safe_load(dump_yaml(config))
    for section in sorted((before.keys() | now.keys()) - apart):
        old, new = before.get(section), now.get(section)
        if not isinstance(old, dict) or not isinstance(new, dict):
            old, new = {"": old}, {"": new}
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                field = f"{section}.{name}".rstrip(".")
                logger.warning(
                    "%s was %s when this run was started before, now %s", field, old.get(name), new.get(name)
                )


def _first_weights(config: RunConfig, runtime: Runtime, stage: QwenVLStage, peers: Peers) -> None:
    if config.checkpoint.init_from is None:
        initialize_weights(stage, config.model, config.seed)
        source = f"fresh, seed {config.seed}"
    else:
        load_weights(Path(config.checkpoint.init_from), config, stage, peers)
        source = config.checkpoint.init_from
    if runtime.is_main:
        logger.info("weights: %s", source)


def _resume(
    checkpoint: Path,
    manager: CheckpointManager,
    stage: QwenVLStage,
    optimizer: MegatronOptimizer,
    runtime: Runtime,
) -> Progress:
    model = model_state(stage)
    with torch.no_grad():
        state = optimizer.sharded_state_dict(model, is_loading=True, metadata=dict(OPTIMIZER_METADATA))
        loaded = manager.load(checkpoint, model, state)
        fill_model(stage, loaded.model)
        restore_optimizer(optimizer, loaded.optimizer)
    progress = Progress(**_known(loaded.manifest.progress))
    if runtime.is_main:
        logger.info("resumed from %s at step %d", checkpoint, progress.step)
    return progress


def _known(saved: dict[str, Any]) -> dict[str, Any]:
    return {name: saved[name] for name in Progress.__dataclass_fields__ if name in saved}


def _loaders(
    config: RunConfig, runtime: Runtime, stage: QwenVLStage, first_step: int
) -> tuple[StepLoader, StepLoader | None]:
    tokenizer = load_tokenizer(config.data.tokenizer)
    needs = DataNeeds(
        pixels=stage.patch_embed is not None,
        tokens=stage.embedding is not None or stage.output_layer is not None,
    )

    def build(**kwargs: Any) -> StepLoader:
        return build_loader(
            config,
            tokenizer=tokenizer,
            dp_rank=runtime.data_rank,
            dp_size=runtime.data_size,
            needs=needs,
            pin_memory=runtime.on_gpu,
            **kwargs,
        )

    validated = bool(config.data.validation_sources) and config.train.validation_interval > 0
    return build(first_step=first_step), build(split="validation") if validated else None
