"""Log of a step's data: samples left out, samples that could not be read, reads that were repeated."""

from __future__ import annotations

import logging

from megatron_qwenvl.batch import Batch
from megatron_qwenvl.data.loading.loader import Step
from megatron_qwenvl.engine.start import Runtime
from megatron_qwenvl.runtime.retry import retry_read

logger = logging.getLogger(__name__)


class DataLog:
    """Logs warnings about this rank's data, step by step.

    Args:
        runtime: this rank's place in the run. Messages that every rank could log come from rank 0, those of a
            tensor-parallel group from its first rank.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._repeated_reads = 0

    def log_step(self, step: Step, batches: list[Batch]) -> None:
        """Log the samples of a loaded step that are left out or masked, and its repeated reads."""
        number = step.info.step + 1
        if self._runtime.is_rank0:
            for skipped in step.info.skipped:
                logger.warning("step %d: sample left out: %s", number, skipped)
        if self._runtime.tensor_rank == 0:
            for reason in (reason for batch in batches for reason in batch.bad_reasons):
                logger.warning("step %d: loss of an unreadable sample masked: %s", number, reason)
        self._log_repeated_reads(number, batches)

    def take_repeated_reads(self) -> int:
        """Reads of all ranks, since the last call, that worked only when they were repeated. Collective."""
        repeated, self._repeated_reads = self._runtime.sum_ranks(self._repeated_reads), 0
        return repeated

    def _log_repeated_reads(self, number: int, batches: list[Batch]) -> None:
        """Log one line for all such reads of a step, here or in a worker."""
        repeated = [line for batch in batches for line in batch.repeated_reads] + list(retry_read.take())
        if repeated:
            more = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
            logger.warning("step %d: the file system refused reads: %s%s", number, repeated[0], more)
        self._repeated_reads += len(repeated)
