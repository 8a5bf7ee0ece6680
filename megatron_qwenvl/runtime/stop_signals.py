"""Handling of the signals that ask a process to stop: an approaching time limit, preemption, a requeue, `kill`, Ctrl-C.

Imports the standard library only, so that a program can install the handlers before it imports anything slow.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .exit_codes import INTERRUPTED, INTERRUPTED_BY_USER
from .exit_process import exit_process

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""SIGUSR1: sent by Slurm before a time limit (`--signal`); SIGTERM: the usual request to end; SIGINT: Ctrl-C."""
WORKER_CLEANUP_SECONDS = 1.0
"""Time for the cleanup of a tool's worker processes; then they are killed."""
CLEANUP_SECONDS = 4.0
"""Default time for the cleanup of the tool itself after that. Slurm kills after KillWait, 30 s by default."""


def _own_signals() -> Iterator[signal.Signals]:
    """Signals of `STOP_SIGNALS` to handle: all but SIGINT in a shell's background job, which ignores Ctrl-C."""
    for number in STOP_SIGNALS:
        if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            yield number


def ignore_stop_signals() -> None:
    """Ignore stop signals, in a worker process whose parent decides when it ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def discard_further_stop_signals() -> None:
    """Handle further stop signals by doing nothing; to be called by the handler of the first one.

    SIG_IGN in its place would make Python print an error for signals that arrived together with the first one.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _do_nothing)


def _do_nothing(_: int, __: FrameType | None) -> None:
    return


@contextmanager
def blocked_stop_signals() -> Iterator[None]:
    """Block stop signals while worker processes are started.

    A new process inherits the signal mask, so that it is protected before it has run a line of its own. Signals for
    this process that arrive meanwhile are delivered at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_on_stop_signals(program: str, seconds: float = CLEANUP_SECONDS) -> None:
    """Make a stop signal end a tool through SystemExit, so that its cleanup code runs.

    The exit code is `INTERRUPTED` (the same command may simply be repeated), or `INTERRUPTED_BY_USER` after Ctrl-C.
    Only the first signal counts, so that a second one does not disturb the cleanup. Worker processes get a SIGTERM and
    a moment for their own cleanup. A thread ends a process that is stuck in a file system or in a rendezvous.

    Args:
        program: name in the message on standard error.
        seconds: time for the cleanup.
    """

    def end(number: int, _: FrameType | None) -> None:
        discard_further_stop_signals()
        print(f"{program}: interrupted by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        for worker in _workers():
            worker.terminate()
        raise SystemExit(_exit_code(number))

    for number in _own_signals():
        signal.signal(number, end)
    arguments = (_wakeup_pipe()[0], seconds)
    threading.Thread(target=_exit_when_stuck, args=arguments, name="stop", daemon=True).start()


def _exit_code(number: int) -> int:
    return INTERRUPTED_BY_USER if number == signal.SIGINT else INTERRUPTED


def _workers() -> list[Any]:
    processes = sys.modules.get("multiprocessing.process")
    return list(getattr(processes, "_children", ()))  # `active_children` would wait for some of them


def _exit_when_stuck(reader: int, seconds: float) -> None:
    number = next(_stop_signals_from(reader))
    time.sleep(WORKER_CLEANUP_SECONDS)
    for worker in _workers():
        worker.kill()
    time.sleep(seconds)
    exit_process(_exit_code(number))


def _wakeup_pipe() -> tuple[int, int]:
    """Create a pipe that receives the number of every signal at once.

    Python's own handlers run only when the main thread returns from its current C call.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader, writer


def _stop_signals_from(reader: int) -> Iterator[signal.Signals]:
    while numbers := os.read(reader, 64):  # empty: the other end is closed
        yield from (signal.Signals(number) for number in numbers if number in STOP_SIGNALS)


class StopRequest:
    """Request to stop that signals set and that the run answers after a step.

    Any number of signals is one request, so a second one does not disturb the save that the first one started.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._started = threading.Event()
        self._wake: int | None = None

    @classmethod
    def listen(cls) -> StopRequest:
        """Install handlers of `STOP_SIGNALS` in this process; must be called in its main thread."""
        request = cls()
        for number in _own_signals():
            signal.signal(number, request._receive)
        return request

    def received(self) -> bool:
        """Return whether a signal has arrived."""
        return self._signal is not None

    @property
    def name(self) -> str:
        """Name of the first signal that arrived, such as `SIGUSR1`; empty without one."""
        return self._signal.name if self._signal else ""

    @property
    def received_before_start(self) -> bool:
        """Whether a signal has arrived and `started` was not called yet, so that there is nothing to save."""
        return self.received() and not self._started.is_set()

    def limit_start(self, seconds: float, on_timeout: Callable[[str], object]) -> None:
        """Call `on_timeout` with the signal's name if the run is still starting `seconds` after a request.

        Nothing can be lost before `started`, and a start may take longer than Slurm waits before it kills: it reads
        large files, or waits for a missing rank.
        """
        reader, self._wake = _wakeup_pipe()
        if self._signal is not None:  # it arrived before the pipe was created
            os.write(self._wake, bytes([self._signal]))
        arguments = (reader, seconds, on_timeout)
        threading.Thread(target=self._watch_start, args=arguments, name="start", daemon=True).start()

    def started(self) -> None:
        """End the limit of `limit_start`: from now on the run checks `received` after every step."""
        if self._wake is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._wake)
            self._wake = None
        self._started.set()

    def _watch_start(self, reader: int, seconds: float, on_timeout: Callable[[str], object]) -> None:
        stop_signal = next(_stop_signals_from(reader), None)
        if stop_signal is not None and not self._started.wait(seconds):
            on_timeout(stop_signal.name)
        os.close(reader)  # not before the other end: Python would print an error for every further signal

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number)
