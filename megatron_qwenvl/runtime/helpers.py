"""Helper processes: started out of reach of stop signals, ended with the process that they help."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from types import FrameType

from .exit_codes import INTERRUPTED
from .interrupt import STOP_SIGNALS, blocked_stop_signals, disregard_stop_signals


def start_resource_tracker() -> None:
    """Start multiprocessing's resource tracker where SIGUSR1 does not end it.

    Without it, semaphores of a process that is killed stay in /dev/shm. It must run before other helpers are started,
    because starting it unblocks signals.
    """
    with blocked_stop_signals():
        resource_tracker.ensure_running()


def prepare_worker() -> None:
    """Initializer of a pool's worker: a stop signal ends its task, which cleans up, and it ends with its parent.

    A worker that waits for work would never notice that the process it works for was killed. Workers are to be started
    with stop signals blocked; from here on they are delivered.
    """

    def end(number: int, _: FrameType | None) -> None:
        disregard_stop_signals()  # the parent passes on what comes to every process of a job anyway
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(
            silence, 2
        )  # the parent tells it; the pool would complain of what a stopped worker has half read
        raise SystemExit(INTERRUPTED)

    for stop in STOP_SIGNALS:
        signal.signal(stop, end)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    except SystemExit:  # a signal came meanwhile; the pool would print the exception
        os._exit(INTERRUPTED)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(INTERRUPTED)
