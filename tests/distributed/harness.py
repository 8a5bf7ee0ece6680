"""Run a function on N gloo ranks, each a fork of this process.

The engine is imported once in the parent, so a case costs a fraction of a second instead of N imports.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import megatron_qwenvl.training.step  # noqa: F401  (imports the engine before forking)
from megatron_qwenvl.runtime.processes import ProcessInfo


def run_ranks(ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """Call `function(process, *args)` on every rank and return the results by rank.

    `process` is the rank's ProcessInfo with a file rendezvous of its own.

    Raises:
        AssertionError: a rank failed or the time ran out; carries the ranks' tracebacks.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(Path(folder), rank, ranks, function, args) for rank in range(ranks)]
        _wait(children, Path(folder), timeout)
        results = [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(ranks)]
    failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(results) if not ok]
    assert not failed, "\n".join(failed)
    return [value for _, value in results]


def _fork(folder: Path, rank: int, ranks: int, function: Callable[..., Any], args: tuple[Any, ...]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        faulthandler.enable()
        torch.set_num_threads(1)
        process = ProcessInfo(rank, ranks, rank, ranks, f"file://{folder}/rendezvous", "test")
        try:
            result = (True, function(process, *args))
        except BaseException:
            result = (False, traceback.format_exc())
        temporary = folder / f"partial-{rank}"
        temporary.write_bytes(pickle.dumps(result))
        temporary.rename(folder / f"result-{rank}")
        code = 0 if result[0] else 1
    finally:
        os._exit(code)


def _wait(children: list[int], folder: Path, timeout: float) -> None:
    """Wait for all ranks; once one fails or the time runs out, kill the others."""
    deadline, running, failed, late = time.monotonic() + timeout, set(children), False, False
    while running:
        for child in tuple(running):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                running.discard(child)
                failed |= status != 0
        late |= not failed and time.monotonic() > deadline
        if running and (failed or late):
            for child in running:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    for rank in range(len(children)):
        if not (folder / f"result-{rank}").exists():
            reason = f"no result within {timeout} s" if late else "killed because another rank failed"
            (folder / f"result-{rank}").write_bytes(pickle.dumps((False, reason)))
