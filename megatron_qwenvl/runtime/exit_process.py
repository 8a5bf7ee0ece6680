"""Immediate exit of a process: without waiting for other ranks, and without leftover temporary files."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn

CLEANUP_SECONDS = 5.0
"""Longest wait for a worker process that does not end, because its disk hangs for example."""


def exit_process(code: int) -> NoReturn:
    """End this process at once with exit code `code`.

    The interpreter's normal shutdown waits for threads and for collectives with ranks that may be gone, and a signal
    that arrives during it would change the exit code. Only one part of it runs here: multiprocessing ends its worker
    processes and removes its temporary directory (`$TMPDIR/pymp-*`) and semaphores (`/dev/shm/sem.*`).
    """
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        cleanup = threading.Thread(target=util._exit_function, daemon=True)
        cleanup.start()
        cleanup.join(CLEANUP_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has gone
            stream.flush()
    os._exit(code)
