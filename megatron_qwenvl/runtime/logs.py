"""Log levels and line format of the processes of a run."""

from __future__ import annotations

import logging
import os
import sys


class _RankFormatter(logging.Formatter):
    """Formatter of lines `time [rank N] message`, tracebacks included; rank 0 is named in errors only."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(message)s")
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        named = self._rank > 0 or record.levelno >= logging.ERROR
        prefix = self.formatTime(record) + (f" [rank {self._rank}] " if named else " ")
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def configure_logging(rank: int) -> None:
    """Log to stderr: rank 0 from INFO, other ranks from WARNING; errors name their rank.

    Other packages log from WARNING, megatron-core from ERROR. MEGATRON_QWENVL_LOG sets another level for this package.
    """
    level = os.environ.get("MEGATRON_QWENVL_LOG", "INFO" if rank == 0 else "WARNING")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, force=True)
    logging.root.handlers[0].setFormatter(_RankFormatter(rank))
    logging.getLogger("megatron_qwenvl").setLevel(level)
    logging.getLogger("megatron").setLevel(logging.ERROR)
