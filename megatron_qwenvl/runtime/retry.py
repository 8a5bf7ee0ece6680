"""Retries of reads from a file system that is temporarily unavailable, because of a server restart or a network error.

A transient error does not end a run of many nodes: the read is repeated, at growing intervals, for as long as
`runtime.retry_minutes` allows. A missing file, missing permission or a file that is too short is an error at once.
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
"""Errors that may go away without intervention. NFS gives the first three; Lustre ESHUTDOWN; FUSE ENOTCONN."""
DEFAULT_MINUTES = 10.0
FIRST_SECONDS, LONGEST_SECONDS = 0.1, 10.0
"""Pause before the first repetition, doubled before each later one up to the longest."""


class RetriedReads:
    """Callable that retries reads and records which were repeated; thread-safe. `retry_read` is the process's own."""

    def __init__(self) -> None:
        self.seconds = 60 * DEFAULT_MINUTES
        """Time for which a read is repeated before its error is raised."""
        self._repeated: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, path: Path, read: Callable[[], T], folder: Path | None = None) -> T:
        """Call `read`, which starts from the beginning each time, until it succeeds.

        Args:
            path: the file or directory that is read, for messages.
            read: opens and reads it.
            folder: a directory known to exist: while it is missing, a missing file counts as a transient error (an
                unmounted file system shows an empty directory).

        Raises:
            OSError: the error is not transient, or persisted for `seconds`.
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
                    self._repeated.append(
                        f"{path}: read after {count} repetitions in {time.monotonic() - began:.1f} s ({reason})"
                    )
            return result

    def take(self) -> tuple[str, ...]:
        """Return a line for each read that was repeated since the last call, and forget them."""
        with self._lock:
            repeated, self._repeated = tuple(self._repeated), []
        return repeated


def is_transient(error: OSError, folder: Path | None = None) -> bool:
    """Return whether an error may go away without intervention; `folder` as in `RetriedReads`."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and folder is not None:
        return not os.path.isdir(folder)
    return error.errno in TRANSIENT


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Read a range of an open file; fewer bytes only at the end of the file. A single `pread` may return fewer.

    Raises:
        OSError: it cannot be read.
    """
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    return data


retry_read = RetriedReads()
"""Retries of this process. A file system is unavailable to all readers of a process at once."""
