"""Watchdog of a run: ends it when it makes no more steps, and writes the stack of every thread of every rank."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from pathlib import Path

from .exit_codes import HUNG

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""Time between the stacks and the exit: launchers kill all ranks once one has ended, and every rank has to report."""


class Watchdog:
    """Timer of the seconds since the last progress of a run.

    Beyond the limit, the stacks of all threads are written to a file, `FAILED (hang)` to the log, and the process
    exits. A thread does this, also while the main thread waits in a collective; if that call holds the GIL, a timer in
    C writes the stacks and ends the process a little later.

    Args:
        limit: seconds without progress; 0: no limit.
        folder: directory of the stacks; created when it is needed.
        rank: global rank, in the name of the file.
    """

    def __init__(self, limit: float, folder: Path, rank: int) -> None:
        self._limit = limit
        self._folder = folder
        self._rank = rank
        self._limit_now = limit
        self._alive_at = time.monotonic()
        self._doing = "starting"
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start watching."""
        if self._limit > 0:
            self.alive("starting")
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self, doing: str, limit: float | None = None) -> None:
        """Restart the timer.

        Args:
            doing: name of the activity that begins, for the message.
            limit: seconds that it may take; None: the usual limit.
        """
        self._alive_at, self._doing = time.monotonic(), doing
        self._limit_now = self._limit if limit is None else limit
        if self._limit > 0:
            faulthandler.dump_traceback_later(self._limit_now + 3 * GRACE_SECONDS, exit=True)

    def seconds_left(self) -> float:
        """Seconds until the run counts as hanging if it makes no progress."""
        return self._alive_at + self._limit_now - time.monotonic()

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while (left := self.seconds_left()) > 0:
            if self._stopped.wait(min(left, 1.0)):
                return
        stacks = self._folder / f"rank_{self._rank:05d}_{time.strftime('%Y%m%dT%H%M%S')}.txt"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with stacks.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:  # the disk is full or the file system hangs; the exit must not depend on it
            faulthandler.dump_traceback(all_threads=True)
        reason = f"no sign of life for {self._limit_now:.0f} s in {self._doing}"
        logger.error("FAILED (hang) %s; stacks of all threads: %s", reason, stacks)
        sys.stderr.flush()
        time.sleep(GRACE_SECONDS)
        os._exit(HUNG)
