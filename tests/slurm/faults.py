"""Faults at random times on a chain that runs on the test cluster."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from .cluster import ENDED, PATIENCE, Cluster
from .jobs import STEPS, chain_jobs, pipeline


def processes_of(cluster: Cluster, job: str, *words: bytes) -> list[int]:
    """Processes of a job of this cluster whose command line holds one of the words, without their own helpers.

    A loader's workers have the command line of their rank, and ignore stop signals.
    """
    marks = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_CONF={cluster.folder}/slurm.conf".encode()}
    found: dict[int, int] = {}  # process and its parent
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            variables = (folder / "environ").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if marks <= set(variables) and any(word in command for word in words):
            found[int(folder.name)] = parent
    return sorted(process for process, parent in found.items() if parent not in found)


class Faults:
    """What may happen to the running job of a chain, chosen by a seed."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._random = random.Random(seed)
        self.done: list[str] = []
        """Every fault that hit something, as `kind of job`."""
        self.kinds: dict[str, Callable[[str], bool]] = {
            "shell TERM": lambda job: self._kill(job, signal.SIGTERM, b"slurm_script", only_first=True),
            "shell USR1": lambda job: self._kill(job, signal.SIGUSR1, b"slurm_script", only_first=True),
            "rank TERM": lambda job: self._kill(job, signal.SIGTERM, b"megatron_qwenvl.train", b"tools/"),
            "rank USR1": lambda job: self._kill(job, signal.SIGUSR1, b"megatron_qwenvl.train", b"tools/"),
            "rank KILL": lambda job: self._kill(job, signal.SIGKILL, b"megatron_qwenvl.train", b"tools/"),
            "steps USR1": lambda job: self._scancel(job, "USR1"),
            "steps TERM": lambda job: self._scancel(job, "TERM"),
            "time limit": lambda job: self._scancel(job, "USR1", "--batch"),
            "requeue": self._requeue,
            "controller away": self._pause_controller,
            "shell USR1, controller away": self._stop_without_controller,
            "shell KILL": lambda job: self._kill(job, signal.SIGKILL, b"slurm_script", only_first=True),
        }

    def one(self, kind: str, job: str) -> bool:
        """Let one fault happen; False if there was nothing that it could hit."""
        hit = self.kinds[kind](job)
        if hit:
            self.done.append(f"{kind} of {job}")
        return hit

    def any(self, job: str) -> bool:
        """A random one."""
        return self.one(self._random.choice(list(self.kinds)), job)

    def pause(self) -> None:
        """A random while."""
        time.sleep(self._random.uniform(1.0, 12.0))

    def _kill(self, job: str, number: signal.Signals, *words: bytes, only_first: bool = False) -> bool:
        found = processes_of(self._cluster, job, *words)
        if not found:
            return False
        process = found[0] if only_first else self._random.choice(found)
        try:
            os.kill(process, number)
        except ProcessLookupError:
            return False
        return True

    def _scancel(self, job: str, name: str, *options: str) -> bool:
        self._cluster.try_run("scancel", f"--signal={name}", *options, job)
        return True

    def _requeue(self, job: str) -> bool:
        self._cluster.try_run("scontrol", "requeue", job)
        return True

    def _pause_controller(self, job: str) -> bool:
        self._cluster.pause_controller(self._random.uniform(2.0, 20.0))
        return True

    def _stop_without_controller(self, job: str) -> bool:
        """The job saves and cannot ask to be started again."""
        found = processes_of(self._cluster, job, b"slurm_script")
        if found:
            self._cluster.pause_controller(20.0, lambda: os.kill(found[0], signal.SIGUSR1))
        return bool(found)


def disturb_chain(cluster: Cluster, site: Path, run: Path, faults: Faults, count: int, *options: str) -> None:
    """Run a chain to its end under about `count` faults, the same number for each step.

    The pipeline is called again whenever a job has ended for good, as a person would.
    """
    left = dict.fromkeys(STEPS, -(-count // len(STEPS)))
    for _ in range(count + 3):
        done = pipeline(cluster, site, run, *options)
        assert done.returncode == 0, done.stderr
        if all(": finished (" in line for line in done.stdout.splitlines()):
            return
        watch(cluster, run, faults, left)
    raise AssertionError(f"the chain ends again and again; faults: {faults.done}\n{done.stdout}")


def watch(cluster: Cluster, run: Path, faults: Faults, left: dict[str, int]) -> None:
    """Disturb the running step until every job has ended; fails when nothing happens any more.

    Args:
        left: faults that each step still gets; counted down.
    """
    seen: object = None
    while True:
        jobs = chain_jobs(run)
        states = {step: cluster.state(job) for step, job in jobs.items()}
        running = [step for step, state in states.items() if state == "RUNNING"]
        if all(state in ENDED for state in states.values()):
            return
        progress = (states, len(faults.done), [log.stat().st_size for log in sorted(run.glob("logs/*.log"))])
        if progress != seen:
            seen, deadline = progress, time.monotonic() + PATIENCE
        assert time.monotonic() < deadline, (
            f"nothing happens for {PATIENCE:.0f} s: {states}; faults: {faults.done}"
        )
        faults.pause()
        if running and left[running[0]]:
            left[running[0]] -= faults.any(jobs[running[0]])
