"""The history of the data with which a run starts or resumes, and the messages about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_qwenvl.config.schema import RunConfig

from .changes import initial_history, resume_history
from .history import DataHistory
from .history_file import read_history
from .sources import Source, current_training_data


@dataclass(frozen=True)
class DataStart:
    """The data of a start.

    Attributes:
        history: of the run's data.
        lines: changes since the checkpoint and other messages, one line each.
        refused: why the run must not resume, where `data.on_change` says so.
    """

    history: DataHistory
    lines: tuple[str, ...] = ()
    refused: str | None = None


def resume_data(
    config: RunConfig, sources: Sequence[Source], checkpoint: Path | None = None, step: int = 0
) -> DataStart:
    """Compare a run's opened sources with what its checkpoint records.

    Args:
        config: the run.
        sources: its training sources.
        checkpoint: from which it resumes; None: it begins.
        step: number of steps done.

    Raises:
        DataError: the checkpoint's record cannot be read.
    """
    now = current_training_data(config, sources)
    modified = list(modified_lines(sources))
    if checkpoint is None:
        return DataStart(initial_history(now), tuple(modified))
    recorded = read_history(checkpoint)
    if recorded is None:
        modified.append(
            f"{checkpoint} does not record its data (an older version saved it): shards, mixture and batch size are "
            "taken to be as they were"
        )
    before = recorded or initial_history(replace(now, skip_steps=()))
    history, changes = resume_history(before, now, step)
    lines = [change.text for change in changes]
    found = "; ".join(change.text for change in changes if change.effect)
    refused = f"data.on_change stop: since {checkpoint}: {found}" if found else None
    return DataStart(history, (*modified, *lines), refused if config.data.on_change == "stop" else None)


def modified_lines(sources: Sequence[Source]) -> Iterator[str]:
    """Yield a line for each source with shards that were modified since they were indexed."""
    for source in sources:
        if line := source.directory.modified_line():
            yield line
