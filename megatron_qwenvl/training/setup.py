"""Set-up of a run before its first step, in two parts.

`prepare_run` performs everything that can fail, without changes in the run's directory; `take_over_run` makes this
start the directory's only owner and records it there.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_qwenvl.checkpoint.run.manager import CheckpointManager
from megatron_qwenvl.checkpoint.run.owner import (
    Hold,
    RunOwner,
    refused_if_owned,
    released_on_error,
    take_together,
)
from megatron_qwenvl.checkpoint.run.ranks import Ranks
from megatron_qwenvl.checkpoint.run.rewind import Rewind
from megatron_qwenvl.checkpoint.run.weights import fill_model, load_weights, model_state
from megatron_qwenvl.checkpoint.storage.manifest import HFMetadata
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.loading.loader import StepLoader
from megatron_qwenvl.engine.optimizer import optimizer_state, restore_optimizer
from megatron_qwenvl.engine.start import Runtime
from megatron_qwenvl.model.build import build_stage, initialize_weights
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.model.shapes import describe_parameters
from megatron_qwenvl.model.stage import QwenVLStage
from megatron_qwenvl.runtime.retry import retry_read

from .loaders import make_loaders
from .metrics import MetricsLog
from .optimizer import build_optimizer
from .progress import Progress
from .run_directory import check_run_directory, record_start
from .step import StepRunner

logger = logging.getLogger(__name__)


@dataclass
class PreparedRun:
    """Components of a run that is ready to start."""

    checkpoints: CheckpointManager
    owner: RunOwner
    runner: StepRunner
    optimizer: MegatronOptimizer
    progress: Progress
    """Counters of the checkpoint that it resumes from."""
    loader: StepLoader
    validation: StepLoader | None
    saved_step: int
    """Step of the run's own checkpoint that it resumes from; -1: none."""
    rewinds: bool
    """Whether it resumes from an older checkpoint than its newest."""


def prepare_run(config: RunConfig, runtime: Runtime, from_step: int | None) -> PreparedRun:
    """Build partition, model, optimizer and data of a run, and load the state of its newest checkpoint.

    Collective; arguments as `Trainer.build`.

    Raises:
        CheckpointError: a required checkpoint is not usable, or the run's directory is not.
        DataError: data that does not fit the configuration.
    """
    partition = make_partition(config, runtime.data_size)
    if runtime.is_rank0:
        log_run(config, partition.describe())
    checkpoints, owner = open_run_directory(config)
    with refused_if_owned(owner, checkpoints.ranks):
        stage = build_stage(config, runtime, partition)
        older = None if from_step is None else checkpoints.rewind_to(from_step)
        newest = older or checkpoints.latest()
        if newest is None:
            checkpoints.hf_metadata = load_initial_weights(config, runtime, stage, checkpoints.ranks)
        runner = StepRunner.build(config, runtime, partition, stage)
        optimizer = build_optimizer(runner.model, config)
        progress = Progress() if newest is None else resume(newest, checkpoints, stage, optimizer, runtime)
        loaders = make_loaders(config, runtime, stage, newest, progress.step, checkpoints.ranks)
    return PreparedRun(
        checkpoints=checkpoints,
        owner=owner,
        runner=runner,
        optimizer=optimizer,
        progress=progress,
        loader=loaders[0],
        validation=loaders[1],
        saved_step=-1 if newest is None else progress.step,
        rewinds=older is not None,
    )


def open_run_directory(config: RunConfig) -> tuple[CheckpointManager, RunOwner]:
    """Open the run's checkpoints and ownership, after waiting until no other start owns it. Collective.

    Raises:
        CheckpointError: the directory cannot be written to, or another start owns it.
    """
    folder = Path(config.run_dir)
    checkpoints = CheckpointManager(folder / "checkpoints", config)
    checkpoints.ranks.run_on_rank0(lambda: retry_read(folder, lambda: check_run_directory(folder)), "refused")
    owner = RunOwner(folder, 60 * config.runtime.takeover_minutes)
    checkpoints.ranks.run_on_rank0(lambda: retry_read(folder, owner.wait_until_free), "refused")
    return checkpoints, owner


def take_over_run(config: RunConfig, runtime: Runtime, run: PreparedRun) -> tuple[Hold, MetricsLog]:
    """Become the owner of the run's directory, and record this start there. Collective.

    Returns:
        The ownership of the directory, and the metrics, in which a rewind is recorded.

    Raises:
        CheckpointError: on every rank, if another start was faster or the directory cannot be written to.
    """
    folder, ranks = Path(config.run_dir), run.checkpoints.ranks
    hold = take_together(run.owner, ranks)
    with released_on_error(run.owner):
        run.checkpoints.prepare(lambda: retry_read(folder, hold.check))
        ranks.run_on_rank0(
            lambda: retry_read(folder, lambda: record_start(config, runtime.process)),
            f"{folder}: the start cannot be recorded",
        )
        rewind = rewind_checkpoints(run.checkpoints, run.progress.step) if run.rewinds else None
        metrics = MetricsLog(config, runtime.is_rank0, run.progress.step, hold.check)
        if rewind:
            metrics.event("rewind", step=rewind.to_step, **asdict(rewind))
    return hold, metrics


def log_run(config: RunConfig, partition: str) -> None:
    """Log name, directory, parameter counts and partition of the run."""
    logger.info("run %s (%s) in %s", config.name, config.stage, config.run_dir)
    logger.info(describe_parameters(config))
    for line in partition.splitlines():
        logger.info(line)


def load_initial_weights(
    config: RunConfig, runtime: Runtime, stage: QwenVLStage, ranks: Ranks
) -> HFMetadata | None:
    """Load the weights of `checkpoint.init_from`, or initialize them, for a run without a checkpoint. Collective.

    Returns:
        Metadata of the Hugging Face directory that the weights come from, if any.

    Raises:
        CheckpointError: `checkpoint.init_from` cannot be used.
    """
    if config.checkpoint.init_from is None:
        initialize_weights(stage, config.model, config.seed)
        hf_metadata, source = None, f"fresh, seed {config.seed}"
    else:
        hf_metadata = load_weights(Path(config.checkpoint.init_from), config, stage, ranks).hf_metadata
        source = config.checkpoint.init_from
    if runtime.is_rank0:
        logger.info("weights: %s", source)
    return hf_metadata


def resume(
    checkpoint: Path,
    manager: CheckpointManager,
    stage: QwenVLStage,
    optimizer: MegatronOptimizer,
    runtime: Runtime,
) -> Progress:
    """Load weights, optimizer state and counters from a checkpoint of this run. Collective.

    Raises:
        CheckpointError: it does not fit the run.
    """
    model = model_state(stage)
    with torch.no_grad():
        state = optimizer_state(optimizer, model, loading=True)
        loaded = manager.load(checkpoint, model, state)
        fill_model(stage, loaded.model)
        restore_optimizer(optimizer, loaded.optimizer)
    progress = Progress.from_saved(loaded.manifest.progress)
    if runtime.is_rank0:
        logger.info("resumed from %s at step %d", checkpoint, progress.step)
    return progress


def rewind_checkpoints(checkpoints: CheckpointManager, step: int) -> Rewind:
    """Move the checkpoints that are newer than that of `--from_step`, and log their new directory. Collective.

    Raises:
        CheckpointError: they cannot be moved.
    """
    rewind = checkpoints.move_newer_checkpoints(step)
    if checkpoints.ranks.is_rank0:
        if rewind.moved:
            logger.warning(
                "went back from step %d to %d: %d newer checkpoints are kept in %s",
                rewind.from_step,
                step,
                rewind.moved,
                rewind.folder,
            )
        else:
            logger.info("step %d is that of the newest checkpoint: nothing to go back over", step)
    return rewind
