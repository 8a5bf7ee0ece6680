"""Log of a step's data: skipped samples, unreadable samples, repeated reads."""

from __future__ import annotations

import logging

from megatron_qwenvl.batch import Batch
from megatron_qwenvl.data.loading.loader import Step
from megatron_qwenvl.engine.start import Runtime
from megatron_qwenvl.runtime.retry import retry_read

logger = logging.getLogger(__name__)


class DataLog:
    """Log of warnings about this rank's data, step by step.

    Args:
        runtime: ranks of this process. Rank 0 logs the messages that would be equal on all ranks, the first rank of a
            tensor-parallel group those that are equal within the group.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._repeated_reads = 0

    def log_step(self, step: Step, batches: list[Batch]) -> None:
        """Log the samples of a loaded step that are skipped or masked, and its repeated reads."""
        number = step.info.step + 1
        if self._runtime.is_rank0:
            for skipped in step.info.skipped:
                logger.warning("step %d: sample left out: %s", number, skipped)
        if self._runtime.tensor_rank == 0:
            for reason in (reason for batch in batches for reason in batch.bad_reasons):
                logger.warning("step %d: loss of an unreadable sample masked: %s", number, reason)
        self._log_repeated_reads(number, batches)

    def take_repeated_reads(self) -> int:
        """Count the repeated reads of all ranks since the last call. Collective."""
        repeated, self._repeated_reads = self._runtime.sum_ranks(self._repeated_reads), 0
        return repeated

    def _log_repeated_reads(self, number: int, batches: list[Batch]) -> None:
        """Log one line for all repeated reads of a step, in this process or in its workers."""
        repeated = [line for batch in batches for line in batch.repeated_reads] + list(retry_read.take())
        if repeated:
            more = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
            logger.warning("step %d: the file system refused reads: %s%s", number, repeated[0], more)
        self._repeated_reads += len(repeated)
