"""Reads that outlast a file system that is away for a while: a server that restarts, a network that stumbles.

An error that such a file system gives is no reason to end a run of many nodes: the read is repeated, at growing
intervals, for as long as `runtime.retry_minutes` allows. A file that does not exist, may not be read or is shorter than
it should be is final at once.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        "EIO ESTALE ETIMEDOUT ETIME EAGAIN EINTR EBUSY ENOTCONN ECONNRESET ECONNABORTED ECONNREFUSED ESHUTDOWN EPIPE "
        "EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET EREMOTEIO ENOLINK ECOMM EPROTO "
        "ENOBUFS ENOMEM ENODEV ENXIO"
    ).split()
    if hasattr(errno, name)
)
"""Errors that may go away by themselves. NFS gives the first three; Lustre ESHUTDOWN; FUSE ENOTCONN."""
DEFAULT_MINUTES = 10.0
FIRST_SECONDS, LONGEST_SECONDS = 0.1, 10.0
"""Pause before the first repetition, doubled before each later one up to the longest."""


class PatientReads:
    """Repeats reads, and remembers which; safe for threads. One for each process: `reads`."""

    def __init__(self) -> None:
        self.seconds = 60 * DEFAULT_MINUTES
        """How long a read is repeated before its error counts."""
        self._told: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, path: Path, read: Callable[[], T], folder: Path | None = None) -> T:
        """Do `read`, which starts from the beginning each time, until it works.

        Args:
            path: what is read, for messages.
            read: opens and reads.
            folder: a directory known to exist: while it does not, a missing file is away with it (an unmounted file
                system shows an empty directory).

        Raises:
            OSError: the error is final, or was still there after `seconds`.
        """
        began, pause, count = time.monotonic(), FIRST_SECONDS, 0
        while True:
            try:
                result = read()
            except OSError as error:
                left = self.seconds - (time.monotonic() - began)
                if not is_transient(error, folder) or left <= 0:
                    raise
                if count == 0:
                    logger.warning("%s: %s: reading again for up to %.0f s", path, error.strerror, left)
                    reason = error.strerror
                time.sleep(min(left, pause * random.uniform(0.5, 1)))
                pause, count = min(2 * pause, LONGEST_SECONDS), count + 1
                continue
            if count:
                with self._lock:
                    self._told.append(
                        f"{path}: read after {count} repetitions in {time.monotonic() - began:.1f} s ({reason})"
                    )
            return result

    def take(self) -> tuple[str, ...]:
        """What was repeated since the last call, one line for each read."""
        with self._lock:
            told, self._told = tuple(self._told), []
        return told


def is_transient(error: OSError, folder: Path | None = None) -> bool:
    """Whether an error may go away by itself; `folder` as in `PatientReads`."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and folder is not None:
        return not os.path.isdir(folder)
    return error.errno in TRANSIENT


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Read a range of an open file; fewer bytes only where the file ends. One `pread` may give fewer.

    Raises:
        OSError: it cannot be read.
    """
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


reads = PatientReads()
"""Of this process. A file system is away for every reader of a process."""
