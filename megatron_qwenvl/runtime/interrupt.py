"""Signals that ask a run to save and stop: a time limit that comes near, preemption, a requeue, `kill`."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""What Slurm sends ahead of a time limit (`--signal`), and what everybody sends to end a process."""


def ignore_stop_signals() -> None:
    """Let a helper process live as long as the process that it helps decides."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Remembers that this process was asked to stop; the run decides when.

    Any number of signals is one request, so a second one does not disturb what the first one started.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    @classmethod
    def listen(cls) -> StopRequest:
        """Take over `STOP_SIGNALS` in this process; must be called in its main thread."""
        request = cls()
        for number in STOP_SIGNALS:
            signal.signal(number, request._receive)
        return request

    @property
    def received(self) -> bool:
        """True once a signal has come."""
        return self._signal is not None

    @property
    def name(self) -> str:
        """Name of the first signal that came, such as `SIGUSR1`; empty if none has."""
        return self._signal.name if self._signal else ""

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number)
