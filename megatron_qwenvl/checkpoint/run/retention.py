"""Removal of a run's older checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Set
from pathlib import Path

from megatron_qwenvl.checkpoint.storage.run_folder import checkpoints_of_run, step_of
from megatron_qwenvl.config.schema import CheckpointConfig


def remove_old_checkpoints(directory: Path, newest: int, keep: CheckpointConfig, damaged: Set[int]) -> None:
    """Remove the checkpoints up to step `newest` but the last `keep.keep_last` and those of `keep.keep_every`.

    Damaged ones do not count as kept. Later steps, left from before a fall-back to an older checkpoint, are replaced
    when the run reaches them.

    Raises:
        OSError: the file system refuses.
    """
    past = [path for path in checkpoints_of_run(directory) if step_of(path) <= newest]
    last = [path for path in past if step_of(path) not in damaged][: keep.keep_last]
    for path in past:
        if path in last or (keep.keep_every and step_of(path) % keep.keep_every == 0):
            continue
        stale = path.with_suffix(".tmp")  # a half-removed checkpoint must not look like one
        path.rename(stale)
        shutil.rmtree(stale, ignore_errors=True)
