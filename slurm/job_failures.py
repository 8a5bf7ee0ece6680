"""Read and write the failures of a run, and those of a job without a run directory (used by restart_policy.py).

Python 3.6 or newer, standard library only.
"""

import time
from pathlib import Path
from typing import List, NamedTuple

from job_log import encode, read_lines

STARTED_AGAIN = "to be started again: "
KILLED = "killed: "
NO_CHECKPOINT = "nothing"
"""Stands in failures.tsv for the name of a checkpoint, before there is one."""


class Failure(NamedTuple):
    """An earlier failure: a line of RUN/failures.tsv without its time."""

    job: str
    checkpoint: str
    cause: str


def read_failures(ledger: Path) -> List[Failure]:
    """Read failures.tsv: time, job, newest checkpoint and cause of every failure of a run."""
    rows = [(line.split("\t") + [""] * 3)[:4] for line in read_lines(ledger) if line]
    return [Failure(job, checkpoint, cause) for _, job, checkpoint, cause in rows]


def read_kills(log: Path, job: str) -> List[Failure]:
    """Read the earlier attempts of a single task that were killed, from the log of its job."""
    mark = "=== " + STARTED_AGAIN + KILLED
    causes = [line[len(mark) :] for line in read_lines(log) if line.startswith(mark)]
    return [Failure(job, NO_CHECKPOINT, cause) for cause in causes]


def newest_checkpoint(run_dir: Path) -> str:
    """Name the newest checkpoint of a run."""
    return "".join(read_lines(run_dir / "checkpoints" / "latest")).strip() or NO_CHECKPOINT


def record(failure: Failure, ledger: Path) -> None:
    """Append a failure to failures.tsv.

    Raises:
        OSError: it cannot be written.
    """
    with ledger.open("ab") as file:
        file.write(encode("\t".join((time.strftime("%Y-%m-%d %H:%M:%S"), *failure)) + "\n"))
