"""The real trainer in forks of this process, with a stop signal to itself at a chosen moment."""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import megatron_qwenvl.training.loop  # noqa: F401  (imports the engine before forking)
from megatron_qwenvl import train
from megatron_qwenvl.runtime import processes
from megatron_qwenvl.runtime.exit_process import exit_process
from megatron_qwenvl.runtime.processes import ProcessInfo

Prepare = Callable[[], None]

PATIENCE = 500
"""Seconds until a process counts as hanging: less than pytest's limit, and more than a busy machine needs."""


def signal_at(place: str, number: int = signal.SIGTERM) -> None:
    """Let this process send itself a signal whenever it comes to a place as `before` names it."""
    before(place, lambda: os.kill(os.getpid(), number))


def before(place: str, action: Callable[[], object]) -> None:
    """Do something whenever this process comes to `module:function` or `module:Class.method`."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(f"megatron_qwenvl.{module}")
    for inner in owners:
        owner = getattr(owner, inner)
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        action()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def redirect(log: Path) -> None:
    """Append what this process says to a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # not pytest's


def start(
    arguments: Sequence[str], log: Path, prepare: Prepare = lambda: None, process: ProcessInfo | None = None
) -> int:
    """Fork a trainer; returns its process id. `prepare` is called in it; `process` is its place among ranks."""
    child = os.fork()
    if child:
        return child
    try:
        redirect(log)
        torch.set_num_threads(1)
        if process is not None:
            processes.detect_process = lambda: process  # type: ignore[assignment, misc]
        prepare()
        exit_process(train.main(arguments))
    except BaseException:
        traceback.print_exc()
    os._exit(99)


def start_ranks(
    arguments: Sequence[str], log: Path, ranks: int, prepare: Callable[[int], None] = lambda rank: None
) -> list[int]:
    """Fork a trainer of several ranks; `prepare` is called in each with its rank."""
    meeting = log.with_suffix(f".{time.monotonic_ns()}")
    return [
        start(
            arguments,
            log,
            lambda rank=rank: prepare(rank),  # type: ignore[misc]
            ProcessInfo(rank, ranks, rank, ranks, f"file://{meeting}", "test"),
        )
        for rank in range(ranks)
    ]


def wait(child: int, seconds: float = PATIENCE) -> int:
    """The exit code of a child, of a signal negative; kills what takes longer."""
    end = os.pidfd_open(child)
    in_time, _, _ = select.select([end], [], [], seconds)
    os.close(end)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert in_time, f"process {child} did not end within {seconds} s"
    return os.waitstatus_to_exitcode(status)
