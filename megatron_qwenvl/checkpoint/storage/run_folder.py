"""The checkpoints folder of a run: names of its checkpoints, and which ones are there. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_qwenvl.runtime.listing import matching_entries
from megatron_qwenvl.runtime.retry import retry_read

from .errors import CheckpointError
from .manifest import MANIFEST_NAME

POINTER_NAME = "latest"

_STEP_NAME = re.compile(r"step_(\d{8,})$")


def checkpoint_name(step: int) -> str:
    """Name of a run's checkpoint."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Step in the name of a checkpoint; -1: not the name of a run's checkpoint."""
    match = _STEP_NAME.match(checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints_of_run(directory: Path) -> list[Path]:
    """List the checkpoints in a run's checkpoints folder, from new to old. A directory gets such a name when it is
    complete."""
    found = retry_read(directory, lambda: matching_entries(directory, "step_*"))
    return sorted((path for path in found if step_of(path) >= 0), key=step_of, reverse=True)


def replaced_checkpoints(directory: Path) -> list[Path]:
    """List the checkpoints that were renamed to make room for a new one of the same step, `step_X.old`."""
    return retry_read(directory, lambda: matching_entries(directory, "step_*.old"))


def resumable_checkpoints(directory: Path) -> list[Path]:
    """List the checkpoints that a run can resume from, from new to old: those of the folder, and those that a crash
    left between the two renames by which a new checkpoint replaces one of the same step."""
    orphans = [path for path in replaced_checkpoints(directory) if not path.with_suffix("").exists()]
    return sorted([*checkpoints_of_run(directory), *orphans], key=step_of_resumable, reverse=True)


def step_of_resumable(checkpoint: Path) -> int:
    """Step of one of `resumable_checkpoints`."""
    return step_of(checkpoint.with_suffix(""))


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint at `path`: the directory itself, or the newest checkpoint of a run's checkpoints folder or of
    a run's directory.

    Raises:
        CheckpointError: there is none.
    """
    if found := retry_read(path, lambda: _find(path)):
        return found
    raise CheckpointError(
        f"{path}: not a checkpoint (no {MANIFEST_NAME}, no {POINTER_NAME}, no checkpoints/)"
    )


def _find(path: Path) -> Path | None:
    for candidate in (path, path / "checkpoints"):
        if (candidate / MANIFEST_NAME).is_file():
            return candidate
        if newest := _newest(candidate):
            return newest
    return None


def _newest(directory: Path) -> Path | None:
    """The checkpoint that the pointer names, or a newer complete one, as a crash may leave the pointer behind."""
    pointer = directory / POINTER_NAME
    named = (
        directory / retry_read(pointer, lambda: pointer.read_text(errors="replace")).strip()
        if pointer.is_file()
        else None
    )
    for checkpoint in checkpoints_of_run(directory):
        if named is not None and step_of(checkpoint) <= step_of(named):
            break
        if (checkpoint / MANIFEST_NAME).is_file():
            return checkpoint
    return named
