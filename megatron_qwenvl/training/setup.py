"""What happens before the first step: the run is announced, the model filled, the data opened."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_qwenvl.batch import DataNeeds
from megatron_qwenvl.checkpoint.run.manager import CheckpointManager
from megatron_qwenvl.checkpoint.run.ranks import Ranks
from megatron_qwenvl.checkpoint.run.rewind import Rewind
from megatron_qwenvl.checkpoint.run.weights import fill_model, load_weights, model_state
from megatron_qwenvl.checkpoint.storage.manifest import Published
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.loading.loader import StepLoader, build_loader
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer, load_tokenizer
from megatron_qwenvl.data.sampling.resume import DataStart, modified_lines, start_data
from megatron_qwenvl.data.sampling.sampler import StepSampler, open_training_sources, training_sampler
from megatron_qwenvl.engine.optimizer import optimizer_state, restore_optimizer
from megatron_qwenvl.engine.start import Runtime
from megatron_qwenvl.model.build import initialize_weights
from megatron_qwenvl.model.shapes import describe_parameters
from megatron_qwenvl.model.stage import QwenVLStage

from .progress import Progress

logger = logging.getLogger(__name__)


def announce(config: RunConfig, partition: str) -> None:
    """Log what is going to run."""
    logger.info("run %s (%s) in %s", config.name, config.stage, config.run_dir)
    logger.info(describe_parameters(config))
    for line in partition.splitlines():
        logger.info(line)


def first_weights(config: RunConfig, runtime: Runtime, stage: QwenVLStage, ranks: Ranks) -> Published | None:
    """Fill the model for a run that has no checkpoint of its own: with `checkpoint.init_from`, or afresh. Collective.

    Returns:
        What is known of the published directory that the weights come from.

    Raises:
        CheckpointError: `checkpoint.init_from` cannot be used.
    """
    if config.checkpoint.init_from is None:
        initialize_weights(stage, config.model, config.seed)
        published, source = None, f"fresh, seed {config.seed}"
    else:
        published = load_weights(Path(config.checkpoint.init_from), config, stage, ranks).published
        source = config.checkpoint.init_from
    if runtime.is_main:
        logger.info("weights: %s", source)
    return published


def resume(
    checkpoint: Path,
    manager: CheckpointManager,
    stage: QwenVLStage,
    optimizer: MegatronOptimizer,
    runtime: Runtime,
) -> Progress:
    """Take weights, optimizer state and counters from a checkpoint of this run. Collective.

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
    if runtime.is_main:
        logger.info("resumed from %s at step %d", checkpoint, progress.step)
    return progress


def set_aside_newer(checkpoints: CheckpointManager, step: int) -> Rewind:
    """Move the checkpoints after the one that the run was told to go on from, and say where they are. Collective.

    Raises:
        CheckpointError: they cannot be moved.
    """
    rewind = checkpoints.set_aside_newer(step)
    if checkpoints.ranks.is_main:
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


def make_sampler(
    config: RunConfig, tokenizer: Tokenizer, checkpoint: Path | None, first_step: int, ranks: Ranks
) -> StepSampler:
    """The sampler of the training steps, which goes on from what a checkpoint records of its data. Collective: rank 0
    compares and tells, and all ranks follow the same history.

    Args:
        config: the run.
        tokenizer: its tokenizer.
        checkpoint: what it goes on from; none: it begins.
        first_step: steps done.
        ranks: all ranks.

    Raises:
        DataError: data that does not fit the configuration, or has changed where `data.on_change` forbids it.
    """
    sources = open_training_sources(config, tokenizer.fingerprint)

    def compare() -> tuple[DataStart | None, str]:
        try:
            return start_data(config, sources, checkpoint, first_step), ""
        except DataError as error:
            return None, str(error)

    mine = compare() if ranks.is_main else None
    found, error = ranks.broadcast(mine)
    if found is None:
        raise DataError(error)
    if ranks.is_main:
        for line in found.lines:
            logger.warning(line)
    if found.refused:
        raise DataError(found.refused)
    return training_sampler(config, sources, found.history)


def make_loaders(
    config: RunConfig,
    runtime: Runtime,
    stage: QwenVLStage,
    checkpoint: Path | None,
    first_step: int,
    ranks: Ranks,
) -> tuple[StepLoader, StepLoader | None]:
    """This rank's training steps from `first_step` on (counted from 0), and its validation set if there is one.
    Collective; arguments as `make_sampler`.

    Raises:
        DataError: data that does not fit the configuration, or has changed where `data.on_change` forbids it.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    sampler = make_sampler(config, tokenizer, checkpoint, first_step, ranks)
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
    training, validation = (
        build(first_step=first_step, sampler=sampler),
        build(split="validation") if validated else None,
    )
    if runtime.is_main:
        for loader in filter(None, (training, validation)):
            for line in loader.sampler.source_notes():
                logger.info(line)
        for line in modified_lines(validation.sampler.sources if validation else ()):
            logger.warning(line)
    return training, validation
