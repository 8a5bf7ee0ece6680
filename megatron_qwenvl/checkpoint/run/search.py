"""Search for the checkpoint that a run resumes from, by all ranks together."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.run_folder import resumable_checkpoints, step_of_resumable
from megatron_qwenvl.runtime.retry import retry_read

from .damage import find_damage
from .ranks import Ranks
from .rewind import is_rewound, of_step

logger = logging.getLogger(__name__)


def find_newest(directory: Path, ranks: Ranks) -> tuple[Path | None, set[int]]:
    """Find the newest undamaged checkpoint. Collective; every file of it has been compared with its digest.

    Args:
        directory: the run's checkpoints folder.
        ranks: all ranks.

    Returns:
        The checkpoint, or None if the run has none, and the steps of newer ones, which are damaged (logged by file).

    Raises:
        CheckpointError: on every rank, if there are checkpoints but all are damaged, or the folder cannot be read.
    """
    found = ranks.run_on_rank0(
        lambda: retry_read(directory, lambda: resumable_checkpoints(directory)),
        f"{directory}: cannot be read",
    )
    candidates = ranks.broadcast(found)
    damaged: set[int] = set()
    for candidate in candidates:
        problems = find_damage(candidate, ranks)
        if not problems:
            return candidate, damaged
        damaged.add(step_of_resumable(candidate))
        if ranks.is_rank0:
            for problem in problems:
                logger.error("damaged checkpoint: %s", problem)
    if candidates:
        raise CheckpointError(f"{directory}: all {len(candidates)} checkpoints are damaged")
    return None, damaged


def find_step(directory: Path, step: int, ranks: Ranks) -> Path | None:
    """Find the checkpoint of a step to go back to, and compare it with its digests. Collective; changes nothing.

    Args:
        directory: the run's checkpoints folder.
        step: the step.
        ranks: all ranks.

    Returns:
        None if Slurm has started the job again after it had gone back to this step already.

    Raises:
        CheckpointError: on every rank, if there is none of this step, or it is damaged.
    """

    def find() -> Path | None:
        return None if is_rewound(directory, step) else of_step(resumable_checkpoints(directory), step)

    found = ranks.run_on_rank0(
        lambda: retry_read(directory, find), f"{directory}: cannot go on from step {step}"
    )
    checkpoint: Path | None = ranks.broadcast(found)
    if checkpoint is None:
        if ranks.is_rank0:
            logger.info(
                "this job has gone back to step %d already: going on from the newest checkpoint", step
            )
        return None
    if problems := find_damage(checkpoint, ranks):
        raise CheckpointError(f"damaged checkpoint: {'; '.join(problems[:4])}")
    return checkpoint
