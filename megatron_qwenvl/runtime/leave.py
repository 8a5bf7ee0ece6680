"""The way out of a process that must not wait for others, and leaves nothing of its own behind."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn

TIDY_SECONDS = 5.0
"""A helper process that does not end, because its disk hangs for example, is not waited for longer."""


def leave(code: int) -> NoReturn:
    """End this process at once with `code`.

    The interpreter's own way out waits for threads and for collectives with ranks that may be gone, and a signal in
    the course of it would change the exit code. Of all that it does, only this is done: multiprocessing ends its
    helper processes and removes its temporary directory (`$TMPDIR/pymp-*`) and semaphores (`/dev/shm/sem.*`).
    """
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        tidy = threading.Thread(target=util._exit_function, daemon=True)
        tidy.start()
        tidy.join(TIDY_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader has gone
            stream.flush()
    os._exit(code)
