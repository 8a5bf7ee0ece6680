"""Sign of life of a run's owner: a counter in a file, raised by a thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

BEATS_PER_PATIENCE = 8
"""Beats within the time after which an owner without one is taken for dead."""
LONGEST_BEAT_SECONDS = 10.0


class Heartbeat:
    """Raises the counter until it is stopped or the run is lost. Never creates the file: a later owner removes it.

    Args:
        path: the counter's file, which exists.
        patience: seconds without a beat after which others take the owner for dead.
        is_lost: whether another start has taken the run over; asked when the file is gone.
    """

    def __init__(self, path: Path, patience: float, is_lost: Callable[[], bool]) -> None:
        self._path = path
        self._seconds = min(LONGEST_BEAT_SECONDS, patience / BEATS_PER_PATIENCE)
        self._is_lost = is_lost
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="owner", daemon=True).start()

    def stop(self) -> None:
        """Stop raising the counter; does not wait for a beat that is being written."""
        self._stopped.set()

    def _run(self) -> None:
        count = 0
        while True:
            count += 1
            try:
                self._write(count)
            except FileNotFoundError:
                if self._is_lost():
                    return
            except OSError:
                pass  # the file system is away, for those who wait as well
            if self._stopped.wait(self._seconds):
                return

    def _write(self, count: int) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, b"%020d\n" % count)
        finally:
            os.close(descriptor)  # NFS writes now
