"""Worker processes: started with stop signals blocked, ended together with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from types import FrameType

from .exit_codes import INTERRUPTED
from .stop_signals import STOP_SIGNALS, blocked_stop_signals, discard_further_stop_signals


def start_resource_tracker() -> None:
    """Start multiprocessing's resource tracker with stop signals blocked, so that SIGUSR1 does not end it.

    Without the tracker, semaphores of a killed process stay in /dev/shm. It must be started before other workers,
    because starting it unblocks signals.
    """
    with blocked_stop_signals():
        resource_tracker.ensure_running()


def prepare_worker() -> None:
    """Initialize a pool's worker: it ends with its parent, and a stop signal ends its task after the task's cleanup.

    An idle worker would never notice that its parent was killed. Workers must be started with stop signals blocked;
    this function unblocks them.
    """

    def end(number: int, _: FrameType | None) -> None:
        discard_further_stop_signals()  # the parent forwards signals that reach every process of a job anyway
        null_device = os.open(os.devnull, os.O_WRONLY)
        # The parent reports the signal; the pool would print errors about half-read messages.
        os.dup2(null_device, 2)
        raise SystemExit(INTERRUPTED)

    for stop in STOP_SIGNALS:
        signal.signal(stop, end)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    except SystemExit:  # a signal was pending; the pool would print the exception
        os._exit(INTERRUPTED)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(INTERRUPTED)
