"""Unique identity of a process (host, boot, pid, start time, Slurm job), and a check of whether it is still alive."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .slurm import own_job

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_COMMON_HOSTS = frozenset({"", "localhost", "localhost.localdomain"})
"""Host names that do not identify a machine."""


@dataclass(frozen=True)
class ProcessIdentity:
    """Identity of one process, different from that of every other process on any machine, also with a reused pid."""

    host: str
    """Name of the machine or container."""
    boot_id: str
    """Boot id of the machine, the same in all its containers; empty if unknown."""
    pid: int
    """Process id within `pid_namespace`."""
    started: str
    """Clock ticks from the boot of the machine to the start of the process; empty if unknown."""
    pid_namespace: str
    """Namespace of `pid`: every container has its own."""
    job: str | None = None
    """Slurm job id; None outside of a job."""
    restarts: int = 0
    """Number of times that Slurm had requeued the job."""

    @classmethod
    def of_this_process(cls, env: Mapping[str, str] | None = None) -> ProcessIdentity:
        """Identity of the calling process; `env` replaces its environment."""
        job = own_job(env)
        return cls(
            host=socket.gethostname(),
            boot_id=_read(_BOOT_ID).strip(),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            pid_namespace=_pid_namespace(),
            job=job.id if job else None,
            restarts=job.restarts if job else 0,
        )

    def is_alive(self, asker: ProcessIdentity) -> bool | None:
        """Return whether the process is still running; None if that cannot be determined from here.

        Args:
            asker: identity of the calling process. Processes on another machine, or in another container of the same
                machine, cannot be examined from it.
        """
        if self.job and self.job == asker.job and self.restarts < asker.restarts:
            return False  # Slurm ends all processes of a job before it requeues it
        if self.boot_id and self.boot_id == asker.boot_id:
            if self.pid_namespace != asker.pid_namespace:
                return None
            return bool(self.started) and _start_of(self.pid) == self.started
        if self.boot_id and asker.boot_id and self.host == asker.host and self.host not in _COMMON_HOSTS:
            return False  # the machine has been rebooted since
        return None

    def __str__(self) -> str:
        job = f" of Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on host {self.host}{job}"


def _start_of(pid: int) -> str:
    """Start time of a process in clock ticks since the boot; empty if it is not running."""
    # The process name, in parentheses, may itself contain blanks and parentheses.
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X", "x") else ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
