"""Progress of long work on the terminal: bytes done, rate and time left."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """Prints one updating line (on a terminal) or a line every few seconds (elsewhere).

    Args:
        what: name of the work.
        total: bytes of the whole work.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = max(total, 1)
        self._stream = sys.stderr
        self._done = 0
        self._began = time.monotonic()
        self._shown = self._began
        self._interval = 0.2 if self._stream.isatty() else 5.0

    def add(self, count: int) -> None:
        """Count `count` more bytes as done."""
        self._done += count
        now = time.monotonic()
        if now - self._shown >= self._interval:
            self._shown = now
            self._print("\r" if self._stream.isatty() else "\n")

    def finish(self) -> None:
        """Print the last state and end the line."""
        self._print("\n")

    def _print(self, end: str) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = self._done / seconds
        left = (self._total - self._done) / rate if rate else 0
        self._stream.write(
            f"{self._what}: {_size(self._done)} of {_size(self._total)} ({100 * self._done / self._total:.0f}%), "
            f"{_size(rate)}/s, {max(int(left), 0) // 60}:{max(int(left), 0) % 60:02d} left{end}"
        )
        self._stream.flush()


def _size(count: float) -> str:
    """`count` bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
