"""Independent jobs in a few worker processes, with the bytes that they have handled.

A conversion is cut into jobs, one output file each. A job holds one tensor at a time, so memory is
bounded by the largest tensor.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

import torch
from torch import Tensor

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.file_checks import OnBytes
from megatron_qwenvl.runtime.stop_signals import blocked_stop_signals
from megatron_qwenvl.runtime.worker_processes import prepare_worker, start_resource_tracker

WORKERS = 3
"""Processes of a conversion. Two cores keep up with a disk; one more works while others wait for it. Each holds some
tensors, so that more cost memory."""

JobType = TypeVar("JobType")
ResultType = TypeVar("ResultType")

_REPORT_SECONDS = 0.2
_SIGNAL_SECONDS = 0.5  # a signal that ended a worker may be on its way to this process, too

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Numbers of glibc's malloc.h."""

_handled: Synchronized[int] | None = None
"""In a worker process: bytes that all workers have handled so far."""


def count_bytes(count: int) -> None:
    """Count `count` more bytes as handled; to be called within a job of `run_jobs`."""
    assert _handled is not None, "outside of a job"
    with _handled.get_lock():
        _handled.value += count


def counted(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on within a job; count the bytes of each when the next one is asked for."""
    for name, tensor in tensors:
        yield name, tensor
        count_bytes(tensor.nbytes)


def run_jobs(
    work: Callable[[JobType], ResultType], jobs: Iterable[JobType], on_bytes: OnBytes, workers: int = WORKERS
) -> list[ResultType]:
    """Run independent jobs in several processes; results in the order of `jobs`.

    Args:
        work: module-level function; calls `count_bytes` as it goes.
        jobs: picklable arguments.
        on_bytes: called with the counted bytes a few times a second.
        workers: processes.

    Raises:
        CheckpointError: a job raised it, or a worker process was killed; the other jobs are abandoned.
    """
    start_resource_tracker()
    context = multiprocessing.get_context("fork")
    handled = context.Value("q", 0)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(handled,)
    ) as pool:
        with blocked_stop_signals():
            futures = [pool.submit(work, job) for job in jobs]
        try:
            _watch(futures, handled, on_bytes)
            return [future.result() for future in futures]
        except BrokenProcessPool:
            time.sleep(_SIGNAL_SECONDS)
            raise CheckpointError(
                "a worker process was killed; perhaps the machine ran out of memory"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(handled: Synchronized[int]) -> None:
    global _handled
    prepare_worker()
    _handled = handled
    torch.set_num_threads(1)
    # Every file has a digest; the checksums of torch's own format cost more than reading what they protect.
    torch.serialization.set_crc32_options(False)
    _reuse_memory()


def _reuse_memory() -> None:
    """Let the C library keep freed memory: fresh memory for every large tensor costs more than filling it."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _watch(futures: list[Future[ResultType]], handled: Synchronized[int], on_bytes: OnBytes) -> None:
    """Report progress until all jobs are done, or raise the error of the first that failed."""
    reported, waiting = 0, set(futures)
    while waiting:
        done, waiting = wait(waiting, _REPORT_SECONDS, FIRST_EXCEPTION)
        now = handled.value
        on_bytes(now - reported)
        reported = now
        for future in done:
            future.result()
