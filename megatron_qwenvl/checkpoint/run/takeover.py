"""Decision whether the last owner of a run is dead, so that another start may take the run over."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.runtime.identity import ProcessIdentity
from megatron_qwenvl.runtime.slurm import is_job_over

from .heartbeat import BEATS_PER_PATIENCE
from .owner_entries import OwnerEntry, beat_path, read_newest

logger = logging.getLogger(__name__)

_SLURM_SECONDS = 30.0
"""Time between two questions to Slurm while a start waits."""


class Takeover:
    """Finds out whether an owner is dead, for a start that wants the run.

    Args:
        folder: the run's `owner` folder.
        me: the process that starts.
        patience: seconds without a beat after which an owner is dead of which nothing else can be found out.
    """

    def __init__(self, folder: Path, me: ProcessIdentity, patience: float) -> None:
        self._folder = folder
        self._me = me
        self._patience = patience

    def is_dead(self, entry: OwnerEntry) -> bool:
        """Whether an owner is dead, which may take a wait; False if there is another owner by now.

        Raises:
            CheckpointError: the owner is alive, or its job is Slurm's and Slurm does not answer.
        """
        alive = self.known_alive(entry)
        if alive is None:
            alive = self._watch(entry)
        if alive:
            raise self.refusal(entry)
        return read_newest(self._folder) == entry

    def known_alive(self, entry: OwnerEntry) -> bool | None:
        """Whether an owner is alive, as far as this process knows without waiting; None: unknown."""
        if entry.process is None:
            return None
        if entry.process == self._me:  # an earlier run of this very process
            return False
        return entry.process.is_alive(self._me)

    def refusal(self, entry: OwnerEntry) -> CheckpointError:
        """The error for a start while this owner is alive."""
        process = entry.process
        who = str(process) if process else "an unknown process"
        stop = "stop it"
        if process:
            stop = f"scancel {process.job}" if process.job else f"kill {process.pid} on {process.host}"
        return CheckpointError(
            f"run_dir {self._folder.parent} is already in use by {who} since {entry.since}: wait for its end, stop it "
            f"({stop}), or choose another run_dir"
        )

    def _watch(self, entry: OwnerEntry) -> bool:
        """Whether an owner elsewhere is alive: by Slurm, or by its beat, timed with this process's clock."""
        asks_slurm = self._asks_slurm(entry)
        began, beat, asked = time.monotonic(), self._read_beat(entry), float("-inf")
        logger.info(
            "the run's last owner, %s, may be alive: waiting up to %.0f s for a sign of life",
            entry.process or "an unknown process",
            self._patience,
        )
        while True:
            if asks_slurm and time.monotonic() - asked > _SLURM_SECONDS:
                assert entry.process is not None and entry.process.job is not None
                if (over := is_job_over(entry.process.job)) is not None:
                    return not over
                asked = time.monotonic()
            if self._read_beat(entry) != beat:
                return True
            if read_newest(self._folder) != entry:
                return False
            if time.monotonic() - began > self._patience:
                break
            time.sleep(min(1.0, self._patience / BEATS_PER_PATIENCE))
        if asks_slurm:
            raise CheckpointError(
                f"{self.refusal(entry)}; it shows no sign of life, but Slurm does not say whether its job is over: "
                "start again when squeue answers"
            )
        return False

    def _asks_slurm(self, entry: OwnerEntry) -> bool:
        """Whether Slurm can tell if the owner's job has ended; of this process's own job it only says that it runs."""
        job = entry.process.job if entry.process else None
        return job is not None and job != self._me.job and shutil.which("squeue") is not None

    def _read_beat(self, entry: OwnerEntry) -> bytes:
        with suppress(OSError):
            return beat_path(self._folder, entry.number).read_bytes()
        return b""
