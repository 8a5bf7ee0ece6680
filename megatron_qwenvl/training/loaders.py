"""The data of a run on this rank: training steps that go on from a checkpoint's data, and the validation set."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron_qwenvl.batch import DataNeeds
from megatron_qwenvl.checkpoint.run.ranks import Ranks
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.loading.loader import StepLoader, build_loader
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer, load_tokenizer
from megatron_qwenvl.data.sampling.resume import DataStart, modified_lines, resume_data
from megatron_qwenvl.data.sampling.sampler import StepSampler, training_sampler
from megatron_qwenvl.data.sampling.sources import open_training_sources
from megatron_qwenvl.engine.start import Runtime
from megatron_qwenvl.model.stage import QwenVLStage

logger = logging.getLogger(__name__)


def make_sampler(
    config: RunConfig, tokenizer: Tokenizer, checkpoint: Path | None, first_step: int, ranks: Ranks
) -> StepSampler:
    """The sampler of the training steps, which goes on from what a checkpoint records of its data. Collective: rank 0
    compares and logs, and all ranks follow the same history.

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
            return resume_data(config, sources, checkpoint, first_step), ""
        except DataError as error:
            return None, str(error)

    mine = compare() if ranks.is_rank0 else None
    found, error = ranks.broadcast(mine)
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
    if runtime.is_rank0:
        for loader in filter(None, (training, validation)):
            for line in loader.sampler.source_notes():
                logger.info(line)
        for line in modified_lines(validation.sampler.sources if validation else ()):
            logger.warning(line)
    return training, validation
