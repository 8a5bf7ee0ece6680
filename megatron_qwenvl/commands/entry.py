"""Entry and exit of every command-line program."""

from __future__ import annotations

import os
import select
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from megatron_qwenvl.runtime.exit_codes import CRASHED, RUN_ERROR
from megatron_qwenvl.runtime.stop_signals import CLEANUP_SECONDS, exit_on_stop_signals


def run_program(name: str, main: Callable[[], int], seconds: float = CLEANUP_SECONDS) -> NoReturn:
    """Run `main` so that a stop signal ends it cleanly, and exit with its code.

    Args:
        name: name of the program in messages.
        main: returns one of `runtime.exit_codes`; an exception that it raises is a crash.
        seconds: time to clean up after a stop signal.
    """
    exit_on_stop_signals(name, seconds)
    try:
        code = main()
        sys.stdout.flush()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
            code = RUN_ERROR
        else:
            traceback.print_exc()
            code = CRASHED
    sys.exit(code)


def _output_is_closed() -> bool:
    """Return whether the reader of a pipe has ended, as `head` does after its last line."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))
