"""What all ranks do together: agree on failures, look for damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from .files import CheckpointError, file_problem
from .manifest import read_manifest


def agree(error: Exception | None, what: str) -> None:
    """Raise on every rank if any rank has an error. Collective.

    Raises:
        CheckpointError: naming `what` and the failed ranks' errors.
    """
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
    found = [f"rank {rank}: {message}" for rank, message in enumerate(errors) if message is not None]
    if found:
        raise CheckpointError(
            f"{what}: {'; '.join(found[:4])}" + (" ..." if len(found) > 4 else "")
        ) from error


def attempt(action: Callable[[], object]) -> Exception | None:
    """Run `action` and return the exception it raised."""
    try:
        action()
    except Exception as error:
        return error
    return None


def find_problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, file by file, the same list on all ranks. Collective; every rank
    digests its share of the files."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine: list[str | None] = []
    try:
        files = sorted(read_manifest(checkpoint).files.items())
    except CheckpointError as error:
        files = []
        mine.append(str(error) if rank == 0 else None)
    mine += [file_problem(checkpoint / name, record) for name, record in files[rank::world]]
    gathered: list[list[str | None]] = [[]] * world
    dist.all_gather_object(gathered, mine)
    return [problem for problems in gathered for problem in problems if problem is not None]
