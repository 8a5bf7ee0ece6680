"""Loaders of this rank: training steps that continue the data of a checkpoint, and the validation set."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron_qwenvl.batch import DataNeeds
from megatron_qwenvl.checkpoint.run.ranks import Ranks
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.loading.loader import StepLoader, build_loader
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer, load_decoder_tokenizer
from megatron_qwenvl.data.sampling.resume import DataStart, modified_lines, resume_data
from megatron_qwenvl.data.sampling.sampler import StepSampler, training_sampler
from megatron_qwenvl.data.sampling.sources import open_training_sources
from megatron_qwenvl.engine.start import Runtime
from megatron_qwenvl.model.stage import QwenVLStage

logger = logging.getLogger(__name__)


def make_sampler(
    config: RunConfig, tokenizer: Tokenizer, checkpoint: Path | None, first_step: int, ranks: Ranks
) -> StepSampler:
    """Make the sampler of the training steps, which continues the data history of a checkpoint.

    Collective: rank 0 compares and logs, and all ranks use the same history.

    Args:
        config: configuration of the run.
        tokenizer: its tokenizer.
        checkpoint: checkpoint to resume from; None: the run starts anew.
        first_step: number of completed steps.
        ranks: all ranks.

    Raises:
        DataError: the data does not fit the configuration, or has changed although `data.on_change` is `stop`.
    """
    sources = open_training_sources(config, tokenizer.fingerprint)

    def compare() -> tuple[DataStart | None, str]:
        try:
            return resume_data(config, sources, checkpoint, first_step), ""
        except DataError as error:
            return None, str(error)

    found, error = ranks.broadcast(compare() if ranks.is_rank0 else None)
    if found is None:
        raise DataError(error)
    if ranks.is_rank0:
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
    """Make the loaders of this rank: training steps from `first_step` (counted from 0), and the validation set if any.

    Collective; arguments as `make_sampler`.

    Raises:
        DataError: the data does not fit the configuration, or has changed although `data.on_change` is `stop`.
    """
    tokenizer = load_decoder_tokenizer(config)
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
    if runtime.is_rank0:
        for loader in filter(None, (training, validation)):
            for line in loader.sampler.source_notes():
                logger.info(line)
        for line in modified_lines(validation.sampler.sources if validation else ()):
            logger.warning(line)
    return training, validation
