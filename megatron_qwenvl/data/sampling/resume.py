"""The data that a run starts or goes on with: its history, and what there is to say about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_qwenvl.config.schema import RunConfig

from .changes import begin, go_on
from .history import DataHistory
from .history_file import read_history
from .sampler import Source, training_data


@dataclass(frozen=True)
class DataStart:
    """What a start finds.

    Attributes:
        history: of the run's data.
        lines: what has changed since the checkpoint, and what else should be known, one line each.
        refused: why the run may not go on, if `data.on_change` says so.
    """

    history: DataHistory
    lines: tuple[str, ...] = ()
    refused: str | None = None


def start_data(
    config: RunConfig, sources: Sequence[Source], checkpoint: Path | None = None, step: int = 0
) -> DataStart:
    """Compare a run's opened sources with what its checkpoint records.

    Args:
        config: the run.
        sources: its training sources.
        checkpoint: what it goes on from; none: it begins.
        step: steps done.

    Raises:
        DataError: the checkpoint's record cannot be read.
    """
    now = training_data(config, sources)
    modified = list(modified_lines(sources))
    if checkpoint is None:
        return DataStart(begin(now), tuple(modified))
    recorded = read_history(checkpoint)
    if recorded is None:
        modified.append(
            f"{checkpoint} does not record its data (an older version saved it): shards, mixture and batch size are "
            "taken to be as they were"
        )
    before = recorded or begin(replace(now, skip_steps=()))
    history, changes = go_on(before, now, step)
    lines = [change.text for change in changes]
    found = "; ".join(change.text for change in changes if change.effect)
    refused = f"data.on_change stop: since {checkpoint}: {found}" if found else None
    return DataStart(history, (*modified, *lines), refused if config.data.on_change == "stop" else None)


def modified_lines(sources: Sequence[Source]) -> Iterator[str]:
    """A line for each source with shards that were modified since they were indexed."""
    for source in sources:
        if line := source.directory.modified_line():
            yield line
