"""The opened sources of a mixture, and the state of a run's data as it is found today."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_qwenvl.config.schema import RunConfig, SourceConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.shards.directory import ShardDirectory, open_directory

from .changes import CurrentData, CurrentSource
from .epochs import ShardList
from .history import StepRange


@dataclass(frozen=True)
class Source:
    """An opened source of the mixture."""

    config: SourceConfig
    directory: ShardDirectory


def open_sources(
    sources: Sequence[SourceConfig],
    root: str,
    tokenizer: str,
    verify_digests: bool = False,
    vocabulary: str | None = None,
) -> tuple[Source, ...]:
    """Open the directories of a mixture; arguments and errors as `open_directory`.

    Raises:
        DataError: also when there is no source.
    """
    if not sources:
        raise DataError("data: expected at least one source, found none")
    return tuple(
        Source(source, open_directory(Path(root) / source.path, tokenizer, verify_digests, vocabulary))
        for source in sources
    )


def current_data(
    sources: Sequence[Source],
    samples_per_step: int,
    seed: int,
    window: int,
    skip_steps: Sequence[StepRange] = (),
) -> CurrentData:
    """Collect all that the order of samples depends on, of opened sources and of the configuration."""
    opened = (
        CurrentSource(source.config.name, source.config.weight, ShardList.of(source.directory))
        for source in sources
    )
    return CurrentData(samples_per_step, tuple(opened), seed, window, tuple(skip_steps))


def current_training_data(config: RunConfig, sources: Sequence[Source]) -> CurrentData:
    """Collect the same for a run's training data."""
    data = config.data
    return current_data(sources, data.global_batch_size, config.seed, data.shuffle_window, data.skip_steps)


def open_training_sources(
    config: RunConfig, tokenizer: str, verify_digests: bool = False
) -> tuple[Source, ...]:
    """Open a run's training sources; arguments and errors as `open_directory`."""
    data = config.data
    return open_sources(data.sources, data.root, tokenizer, verify_digests, data.tokenizer)
