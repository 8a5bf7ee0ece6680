"""Queries to Slurm. A failed or empty reply means unknown: the controller may be temporarily unavailable."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

LIVE_STATES = frozenset(
    "PENDING CONFIGURING RUNNING SUSPENDED COMPLETING STOPPED SIGNALING RESIZING STAGE_OUT REQUEUED REQUEUE_HOLD "
    "REQUEUE_FED SPECIAL_EXIT".split()
)
"""States of a job that is running, ending or yet to run, as in squeue's `%T`."""

_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """The Slurm job that a process belongs to."""

    id: str
    restarts: int
    """Number of times that Slurm has requeued it."""


def own_job(env: Mapping[str, str] | None = None) -> Job | None:
    """Slurm job of this process; None outside of Slurm. `env` replaces the process's environment."""
    env = os.environ if env is None else env
    job, restarts = env.get("SLURM_JOB_ID"), env.get("SLURM_RESTART_COUNT", "")
    return Job(job, int(restarts) if restarts.isdecimal() else 0) if job else None


def is_job_over(job: str) -> bool | None:
    """Return whether a job has finally ended; None if Slurm does not answer (no squeue, no controller, a timeout)."""
    command = ["squeue", "--noheader", "--states=all", "--job", job, "--format", "%T"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return True if "Invalid job id" in done.stderr else None  # Slurm has forgotten it
    states = done.stdout.split()
    return not LIVE_STATES.intersection(states) if states else None
