"""What is told of a step's data: samples left out, samples that could not be read, reads that were repeated."""

from __future__ import annotations

import logging

from megatron_qwenvl.batch import Batch
from megatron_qwenvl.data.loading.loader import Step
from megatron_qwenvl.engine.start import Runtime
from megatron_qwenvl.runtime.retry import reads

logger = logging.getLogger(__name__)


class DataLog:
    """Tells of this rank's data, step by step.

    Args:
        runtime: this rank's place. Rank 0 tells what all ranks know, the first of a tensor-parallel group what the
            group knows.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._repeated_reads = 0

    def tell(self, step: Step, batches: list[Batch]) -> None:
        """Log what is worth knowing of a step's data, which has been loaded."""
        number = step.info.step + 1
        if self._runtime.is_main:
            for skipped in step.info.skipped:
                logger.warning("step %d: sample left out: %s", number, skipped)
        if self._runtime.tensor_rank == 0:
            for reason in (reason for batch in batches for reason in batch.bad_reasons):
                logger.warning("step %d: loss of an unreadable sample masked: %s", number, reason)
        self._tell_repeated_reads(number, batches)

    def take_repeated_reads(self) -> int:
        """Reads of all ranks, since the last call, that worked only when they were repeated. Collective."""
        repeated, self._repeated_reads = self._runtime.sum_ranks(self._repeated_reads), 0
        return repeated

    def _tell_repeated_reads(self, number: int, batches: list[Batch]) -> None:
        """One line for all such reads of a step, here or in a worker."""
        told = [line for batch in batches for line in batch.read_again] + list(reads.take())
        if told:
            more = f" and {len(told) - 1} more" if len(told) > 1 else ""
            logger.warning("step %d: the file system refused reads: %s%s", number, told[0], more)
        self._repeated_reads += len(told)
