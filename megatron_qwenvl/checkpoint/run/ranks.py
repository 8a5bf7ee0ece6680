"""All ranks of a run, as checkpoints need them: exchange of values and errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError

T = TypeVar("T")

_POLL_SECONDS = 0.05


class Ranks:
    """All ranks of a run, as checkpoints need them. Every method is collective.

    The ranks have a gloo group of their own: one may wait for another's disk much longer than a collective of training
    may take, and the exchanged values are in host memory.

    Args:
        timeout_minutes: how long a rank waits for the others.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        self.rank = dist.get_rank()
        """This rank."""
        self.size = dist.get_world_size()
        """Number of ranks."""

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(self._group)

    def all_gather(self, value: T) -> list[T]:
        """Gather the values of all ranks on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def gather(self, value: T) -> list[T]:
        """Gather the values of all ranks on rank 0; returns an empty list elsewhere."""
        values: list[Any] | None = [None] * self.size if self.is_rank0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def broadcast(self, value: T | None) -> T:
        """Send the value of rank 0 to every rank."""
        shared: list[Any] = [value]
        dist.broadcast_object_list(shared, src=0, group=self._group, device=torch.device("cpu"))
        return cast(T, shared[0])

    def all_true(self, here: bool) -> bool:
        """Whether the value is true on all ranks."""
        everywhere = torch.tensor(int(here))
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=self._group)
        return bool(everywhere)

    def all_arrive(self, seconds: float) -> bool:
        """Whether every rank calls this within the time.

        After a False, a thread of the group still waits for the others: the process must end at once.
        """
        coming = dist.barrier(self._group, async_op=True)
        end = time.monotonic() + seconds
        while not coming.is_completed() and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        return bool(coming.is_completed() and coming.is_success())

    def raise_on_any_error(self, error: Exception | None, what: str) -> None:
        """Raise on every rank if any rank has an error.

        Raises:
            CheckpointError: naming `what` and the failed ranks' errors.
        """
        errors = self.all_gather(None if error is None else _describe(error))
        found = [f"rank {rank}: {message}" for rank, message in enumerate(errors) if message is not None]
        if len(found) == self.size and len(set(errors)) == 1:
            found = [str(errors[0])]
        if found:
            raise CheckpointError(
                f"{what}: {'; '.join(found[:4])}" + (" ..." if len(found) > 4 else "")
            ) from error

    def run_on_every_rank(self, action: Callable[[], T], what: str) -> T:
        """Run `action`, which must not be collective itself, on every rank; each gets its own result.

        Raises:
            CheckpointError: on every rank, if it fails on any.
        """
        results: list[T] = []
        self.raise_on_any_error(attempt(lambda: results.append(action())), what)
        return results[0]

    def run_on_rank0(self, action: Callable[[], T], what: str) -> T | None:
        """Run `action` on rank 0, which gets its result; the others get None.

        Raises:
            CheckpointError: on every rank, if it fails.
        """
        return self.run_on_every_rank(lambda: action() if self.is_rank0 else None, what)


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def attempt(action: Callable[[], object]) -> Exception | None:
    """Run `action` and return the exception that it raised, or None."""
    try:
        action()
    except Exception as error:
        return error
    return None
