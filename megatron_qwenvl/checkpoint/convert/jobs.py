"""Converting weights between layouts: plans that are checked before a byte is written, and their execution.

A conversion is cut into jobs, one output file each, that run in a few processes. A job holds one tensor at a
time, so memory is bounded by the largest tensor.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

import torch
from torch import Tensor

from megatron_qwenvl.checkpoint.formats.mappings import Same
from megatron_qwenvl.checkpoint.formats.names import Rule
from megatron_qwenvl.checkpoint.storage.files import CheckpointError, OnBytes
from megatron_qwenvl.checkpoint.storage.finite import NonFinite, find_non_finite
from megatron_qwenvl.checkpoint.storage.tensors import TensorSource, TensorSpec
from megatron_qwenvl.engine.checkpoint_tensors import DistributedFolder
from megatron_qwenvl.runtime.helpers import prepare_worker, start_resource_tracker
from megatron_qwenvl.runtime.interrupt import blocked_stop_signals

WORKERS = 3
"""Processes of a conversion. Two cores keep up with a disk; one more works while others wait for it. Each holds some
tensors, so that more cost memory."""

FILE_BYTES = 1 << 30
"""Output files are about this large; a larger tensor has a file of its own."""

JobType = TypeVar("JobType")
ResultType = TypeVar("ResultType")


@dataclass(frozen=True)
class Part:
    """Tensors of one source and the rules by which they become others."""

    source: TensorSource
    rules: tuple[Rule, ...]


def our_specs(part: Part) -> dict[str, TensorSpec]:
    """Names, shapes and types that a part's published tensors have in our layout.

    Raises:
        CheckpointError: a published tensor is missing or of a shape that its rule cannot take.
    """
    return _specs(part, lambda rule: (rule.theirs, rule.ours, rule.mapping.to_ours))


def their_specs(part: Part) -> dict[str, TensorSpec]:
    """The same from our layout to the published one."""
    return _specs(part, lambda rule: (rule.ours, rule.theirs, rule.mapping.to_theirs))


_Direction = Callable[[Rule], tuple[tuple[str, ...], tuple[str, ...], Callable[[list[Tensor]], list[Tensor]]]]


def _specs(part: Part, direction: _Direction) -> dict[str, TensorSpec]:
    found: dict[str, TensorSpec] = {}
    for rule in part.rules:
        inputs, outputs, apply = direction(rule)
        missing = [name for name in inputs if name not in part.source.specs]
        if missing:
            raise CheckpointError(f"tensor {missing[0]} is missing")
        specs = [part.source.specs[name] for name in inputs]
        if len({spec.dtype for spec in specs}) > 1:
            raise CheckpointError(f"tensors {', '.join(inputs)} differ in type")
        try:
            results = apply([torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"tensor {inputs[0]} of shape {list(specs[0].shape)}: {error}") from None
        found |= {
            name: TensorSpec(tuple(result.shape), result.dtype)
            for name, result in zip(outputs, results, strict=True)
        }
    return found


def to_ours(part: Part, bad: list[NonFinite]) -> Iterator[tuple[str, Tensor]]:
    """Our tensors of a part, one rule's at a time. What is read and is not finite is added to `bad`."""
    for rule in part.rules:
        read = [_read(part.source, name, bad) for name in rule.theirs]
        yield from zip(rule.ours, rule.mapping.to_ours(read), strict=True)


def to_theirs(part: Part, bad: list[NonFinite]) -> Iterator[tuple[str, Tensor]]:
    """Published tensors of a part, one rule's at a time; what is stored alike comes in pieces along its first axis.
    What is read and is not finite is added to `bad`."""
    for rule in part.rules:
        if isinstance(part.source, DistributedFolder) and isinstance(rule.mapping, Same):
            row = 0
            for rows in part.source.rows(rule.ours[0]):
                _look_at(rule.ours[0], rows, (row,) if rows.dim() else (), bad)
                row += len(rows) if rows.dim() else 0
                yield rule.theirs[0], rows
            continue
        read = [_read(part.source, name, bad) for name in rule.ours]
        yield from zip(rule.theirs, rule.mapping.to_theirs(read), strict=True)


def _read(source: TensorSource, name: str, bad: list[NonFinite]) -> Tensor:
    tensor = source.read(name)
    _look_at(name, tensor, (), bad)
    return tensor


def _look_at(name: str, tensor: Tensor, offsets: tuple[int, ...], bad: list[NonFinite]) -> None:
    if found := find_non_finite(name, tensor, offsets):
        bad.append(found)


def split_into_files(
    part: Part, sizes: Mapping[str, TensorSpec], key: Callable[[Rule], Iterable[str]]
) -> list[Part]:
    """Cut a part into parts of about `FILE_BYTES` of output; `key` gives a rule's output names."""
    parts: list[Part] = []
    rules: list[Rule] = []
    total = 0
    for rule in part.rules:
        size = sum(sizes[name].nbytes for name in key(rule))
        if rules and total + size > FILE_BYTES:
            parts.append(Part(part.source, tuple(rules)))
            rules, total = [], 0
        rules.append(rule)
        total += size
    return [*parts, Part(part.source, tuple(rules))] if rules else parts


_REPORT_SECONDS = 0.2
_SIGNAL_SECONDS = 0.5  # a signal that ended a worker may be on its way to this process, too

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Numbers of glibc's malloc.h."""

_handled: Synchronized[int] | None = None
"""In a worker process: bytes that all workers have handled so far."""


def count_bytes(count: int) -> None:
    """Called within a job of `run_jobs`: `count` more bytes are done."""
    assert _handled is not None, "outside of a job"
    with _handled.get_lock():
        _handled.value += count


def counted(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on within a job and count each one's bytes when it is done with."""
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
        on_bytes: told about the counted bytes a few times a second.
        workers: processes.

    Raises:
        CheckpointError: what a job raised, or a worker process was killed; the other jobs are abandoned.
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
    """Report progress until all jobs are done or one has failed; raises what it raised."""
    told, waiting = 0, set(futures)
    while waiting:
        done, waiting = wait(waiting, _REPORT_SECONDS, FIRST_EXCEPTION)
        now = handled.value
        on_bytes(now - told)
        told = now
        for future in done:
            future.result()
