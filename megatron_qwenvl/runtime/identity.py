"""Which process this is among all that ever ran (host, boot, number, start, Slurm job), and whether it lives."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .slurm import own_job

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_COMMON_HOSTS = frozenset({"", "localhost", "localhost.localdomain"})
"""Names that say nothing of which machine it is."""


@dataclass(frozen=True)
class ProcessIdentity:
    """One process, told from every other one on any machine, also from later ones with the same number."""

    host: str
    """Name of the machine or container."""
    boot_id: str
    """The machine's boot, the same in all its containers; empty where it is not known."""
    pid: int
    """Number of the process in its namespace."""
    started: str
    """Clock ticks from the boot to its start; empty where that is not known."""
    pid_namespace: str
    """Within which `pid` counts: containers have their own."""
    job: str | None = None
    """Slurm's number of the job; None outside of one."""
    restarts: int = 0
    """How often Slurm had requeued the job."""

    @classmethod
    def of_this_process(cls, env: Mapping[str, str] | None = None) -> ProcessIdentity:
        """The identity of the calling process; `env` is its environment, unless given."""
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
        """Whether the process still runs, as far as `asker`, which is the calling process, can find out by itself; None
        where it cannot: on another machine, or in another container of this one."""
        if self.job and self.job == asker.job and self.restarts < asker.restarts:
            return False  # Slurm ends all of a job before it starts it again
        if self.boot_id and self.boot_id == asker.boot_id:
            if self.pid_namespace != asker.pid_namespace:
                return None
            return bool(self.started) and _start_of(self.pid) == self.started
        if self.boot_id and asker.boot_id and self.host == asker.host and self.host not in _COMMON_HOSTS:
            return False  # the machine was started anew since
        return None

    def __str__(self) -> str:
        job = f" of Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on host {self.host}{job}"


def _start_of(pid: int) -> str:
    """When a process started, in clock ticks since the boot; empty if it does not run (any more)."""
    fields = (
        _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    )  # the name may hold blanks and brackets
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
