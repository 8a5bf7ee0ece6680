"""Signals that ask a process to stop: a time limit that comes near, preemption, a requeue, `kill`, Ctrl-C.

Imports nothing but the standard library, so that a program can answer them before it loads anything that takes time.
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
from .leave import leave

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""What Slurm sends ahead of a time limit (`--signal`), what everybody sends to end a process, and Ctrl-C."""
WORKER_SECONDS = 1.0
"""What a tool's worker processes have to clean up before they are killed."""
STUCK_SECONDS = 4.0
"""What the tool itself has after that, unless it says otherwise; Slurm's KillWait, after which it kills, is 30 s."""


def _own_signals() -> Iterator[signal.Signals]:
    """Those of `STOP_SIGNALS` that are meant for this process: a shell lets its background jobs ignore Ctrl-C."""
    for number in STOP_SIGNALS:
        if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            yield number


def ignore_stop_signals() -> None:
    """Let a helper process live as long as the process that it helps decides."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def disregard_stop_signals() -> None:
    """Let further stop signals change nothing; to be called by the handler of the first one. Of those that came with it
    Python would complain if they were ignored from now on."""
    for number in STOP_SIGNALS:
        signal.signal(number, _disregard)


def _disregard(_: int, __: FrameType | None) -> None:
    return


@contextmanager
def blocked_stop_signals() -> Iterator[None]:
    """Start helper processes here: a program inherits what is blocked, so that they are safe before they run a line of
    their own. What comes to this process meanwhile is delivered at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_stop_signals(program: str, seconds: float = STUCK_SECONDS) -> None:
    """Let a stop signal end a tool: first by SystemExit, so that what it cleans up is cleaned up.

    The exit code says that starting it again is all that is needed: `INTERRUPTED`, after Ctrl-C as shells have it.
    Only the first signal counts, so that a second one does not disturb the cleaning up. Worker processes get a SIGTERM
    and a moment for theirs. What is stuck, in a file system or in a rendezvous, is ended by a thread.

    Args:
        program: says so on standard error.
        seconds: what cleaning up may take.
    """

    def end(number: int, _: FrameType | None) -> None:
        disregard_stop_signals()
        print(f"{program}: interrupted by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        for worker in _workers():
            worker.terminate()
        raise SystemExit(_code(number))

    for number in _own_signals():
        signal.signal(number, end)
    arguments = (_wake_pipe()[0], seconds)
    threading.Thread(target=_end_when_stuck, args=arguments, name="stop", daemon=True).start()


def _code(number: int) -> int:
    return INTERRUPTED_BY_USER if number == signal.SIGINT else INTERRUPTED


def _workers() -> list[Any]:
    processes = sys.modules.get("multiprocessing.process")
    return list(getattr(processes, "_children", ()))  # `active_children` would wait for some of them


def _end_when_stuck(reader: int, seconds: float) -> None:
    number = next(_stop_signals_from(reader))
    time.sleep(WORKER_SECONDS)
    for worker in _workers():
        worker.kill()
    time.sleep(seconds)
    leave(_code(number))


def _wake_pipe() -> tuple[int, int]:
    """A pipe that gets the number of every signal at once; Python's own handlers wait while the main thread is in a
    call that takes long."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader, writer


def _stop_signals_from(reader: int) -> Iterator[signal.Signals]:
    while numbers := os.read(reader, 64):  # empty: the other end is closed
        yield from (signal.Signals(number) for number in numbers if number in STOP_SIGNALS)


class StopRequest:
    """Remembers that this process was asked to stop; the run decides when.

    Any number of signals is one request, so a second one does not disturb what the first one started.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._started = threading.Event()
        self._wake: int | None = None

    @classmethod
    def listen(cls) -> StopRequest:
        """Take over `STOP_SIGNALS` in this process; must be called in its main thread."""
        request = cls()
        for number in _own_signals():
            signal.signal(number, request._receive)
        return request

    def received(self) -> bool:
        """True once a signal has come."""
        return self._signal is not None

    @property
    def name(self) -> str:
        """Name of the first signal that came, such as `SIGUSR1`; empty if none has."""
        return self._signal.name if self._signal else ""

    @property
    def came_early(self) -> bool:
        """True once a signal has come, until `started`: there is nothing to lose yet."""
        return self.received() and not self._started.is_set()

    def limit_start(self, seconds: float, leave: Callable[[str], object]) -> None:
        """Call `leave` with the signal's name if the run is still starting `seconds` after a request.

        Until `started` nothing can be lost, and a start may take longer than Slurm waits before it kills: it reads
        large files, or waits for a rank that does not come.
        """
        reader, self._wake = _wake_pipe()
        if self._signal is not None:  # before the pipe was there
            os.write(self._wake, bytes([self._signal]))
        arguments = (reader, seconds, leave)
        threading.Thread(target=self._watch_start, args=arguments, name="start", daemon=True).start()

    def started(self) -> None:
        """From now on the run itself looks whether a signal was `received`, after every step."""
        if self._wake is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._wake)
            self._wake = None
        self._started.set()

    def _watch_start(self, reader: int, seconds: float, leave: Callable[[str], object]) -> None:
        asked = next(_stop_signals_from(reader), None)
        if asked is not None and not self._started.wait(seconds):
            leave(asked.name)
        os.close(reader)  # not before the other end: Python would complain of every further signal

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number)
