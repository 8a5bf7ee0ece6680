"""Worker processes of the loader: how they start, and when they end.

They are started by a fork server that has imported this package and nothing else: forking the training process itself
would copy its threads' locks and its process groups in whatever state they are, and `spawn` would import torch once for
every worker.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import types
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from megatron_qwenvl.runtime.stop_signals import blocked_stop_signals, ignore_stop_signals
from megatron_qwenvl.runtime.worker_processes import start_resource_tracker


def worker_arguments(modules: list[str]) -> tuple[dict[str, Any], Connection]:
    """Start the fork server and write the arguments of a `DataLoader` with workers.

    Args:
        modules: imported by the fork server, so that no worker imports them.

    Returns:
        The arguments, and the end of a pipe: workers end when it is closed.
    """
    lifeline, alive = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*modules, f"{__package__}.fork_server"])
    _start_helpers()
    arguments = {
        "multiprocessing_context": context,
        "worker_init_fn": functools.partial(_prepare_worker, lifeline),
    }
    return arguments, alive


def _start_helpers() -> None:
    """Start multiprocessing's own helper processes so that a signal to every process of a job does not end them.

    Without the fork server there are no workers.
    """
    start_resource_tracker()
    with blocked_stop_signals():
        forkserver.ensure_running()


def _prepare_worker(lifeline: Connection, _: int) -> None:
    """Let this worker end with the loader that uses it, and with nothing else.

    The loader's process holds the other end of `lifeline`. Torch's own watch looks at the worker's parent, which is the
    fork server, and that one lives as long as a worker. Torch and Python also end a worker by SIGTERM, but Slurm sends
    that to every process of a job, and the training process still wants its batches to finish a step and save.
    """
    ignore_stop_signals()

    def watch() -> None:
        multiprocessing.connection.wait([lifeline])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def hidden_main() -> Iterator[None]:
    """Let processes that start meanwhile not import the training program again, which takes longer than all else."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
