"""Indexing of `index_shards`, on MPI ranks, in worker processes or in this process, with progress lines."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.rendering.tokenizer import load_tokenizer
from megatron_qwenvl.data.shards.catalog import failed_shards, indexed_options
from megatron_qwenvl.data.shards.directory import open_directory
from megatron_qwenvl.data.shards.index import load_index
from megatron_qwenvl.data.shards.index_builder import JOINT
from megatron_qwenvl.data.shards.indexing import IndexJob, ShardResult, index_directory
from megatron_qwenvl.data.shards.listing import list_shards
from megatron_qwenvl.data.shards.skipped import merge, printable
from megatron_qwenvl.runtime.processes import LaunchError, ProcessInfo, detect_process, load_mpi
from megatron_qwenvl.runtime.stop_signals import blocked_stop_signals
from megatron_qwenvl.runtime.worker_processes import prepare_worker, start_resource_tracker

SIGNAL_SECONDS = 0.5
"""Time for a signal that ended a worker to arrive in this process, too."""


def index_directories(arguments: argparse.Namespace) -> int:
    """Write indices and manifests of all directories; returns the number of shards that could not be indexed.

    Raises:
        DataError: a directory cannot be indexed, or a worker process was killed.
        LaunchError: see `open_executor`.
    """
    wanted = {"unparsed_markup": arguments.unparsed_markup, "ref_blank": arguments.ref_blank}
    options = {name: value for name, value in wanted.items() if value}
    job = IndexJob(arguments.tokenizer, arguments.verify_images, arguments.force, options)
    failed = 0
    try:
        with open_executor(arguments.workers) as pool:
            for directory in arguments.directories if pool else ():
                results = index_directory(directory, job, pool, progress(directory))
                failed += summarize(directory, results)
    except BrokenProcessPool:
        time.sleep(SIGNAL_SECONDS)
        raise DataError("a worker process was killed; perhaps the machine ran out of memory") from None
    return failed


def check_directory(directory: Path, vocabulary: str | None) -> None:
    """Compare every shard with the digest in its index.

    Raises:
        DataError: a shard differs or is not indexed; the message names it.
    """
    fingerprint = load_tokenizer(vocabulary).fingerprint
    open_directory(directory, fingerprint, verify_digests=True, vocabulary=vocabulary)
    print(f"{directory}: every shard is as it was indexed")


@contextlib.contextmanager
def open_executor(workers: int) -> Iterator[Executor | None]:
    """Open the executor of the shards: MPI ranks, a process pool, or a thread of this process.

    Yields None on all ranks except rank 0; under MPI they work for rank 0 first.

    Raises:
        LaunchError: contradictory launcher variables, or mpi4py cannot connect the ranks.
    """
    process = detect_process(rendezvous=False)
    if process.world_size > 1 and process.launcher in ("mpi", "slurm"):
        with mpi_ranks(process) as pool:
            yield pool
    elif process.rank > 0:
        yield None
    elif workers > 1:
        with worker_processes(workers) as pool:
            yield pool
    else:
        with ThreadPoolExecutor(1) as pool:
            yield pool


def worker_processes(workers: int) -> ProcessPoolExecutor:
    """Make a process pool and start all its workers."""
    start_resource_tracker()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=prepare_worker)
    with blocked_stop_signals():
        for _ in range(workers):
            pool.submit(os.getpid)
    return pool


@contextlib.contextmanager
def mpi_ranks(process: ProcessInfo) -> Iterator[Executor | None]:
    """Open an executor of all ranks on rank 0; the other ranks work for it and get None."""
    world = load_mpi(f"started as {process.world_size} ranks, which needs mpi4py").COMM_WORLD
    if world.size != process.world_size:  # each rank would index everything
        raise LaunchError(
            f"{process.launcher} started {process.world_size} ranks but mpi4py sees {world.size}: its MPI library does "
            "not know this launcher (under Slurm try srun --mpi=pmix)"
        )
    from mpi4py.futures import MPICommExecutor

    ranks: Any = MPICommExecutor(world, root=0)  # its stub is wrong on what entering gives
    with ranks as pool:
        yield pool


def progress(directory: Path) -> Callable[[ShardResult, int], None]:
    """Print failures at once, and a line with rate and time left at most every two seconds."""
    start = shown = time.monotonic()
    done = 0

    def show(result: ShardResult, total: int) -> None:
        nonlocal done, shown
        done += 1
        now = time.monotonic()
        if result.error:
            print(f"error: {result.error}", file=sys.stderr, flush=True)
        if done == total or now - shown > 2:
            shown = now
            rate = done / max(now - start, 1e-9)
            left = (total - done) / rate
            print(f"{directory}: {done}/{total} shards, {rate:.1f} shards/s, {left:.0f} s left", flush=True)

    return show


def summarize(directory: Path, results: list[ShardResult]) -> int:
    """Print the contents of a directory; returns the number of shards that failed."""
    entries = [result.entry for result in results if result.entry]
    failed = len(results) - len(entries)
    print(
        f"{directory}: {sum(e.samples for e in entries)} samples with {sum(e.images for e in entries)} images in "
        f"{len(entries)} shards ({sum(r.fresh for r in results)} indexed now), "
        f"{sum(e.skipped for e in entries)} samples skipped, {failed} shards failed"
    )
    if options := str(indexed_options(directory)):
        print(f"{directory}: indexed with {options}")
    for kind in merge(itertools.chain.from_iterable(result.skipped for result in results)):
        print(f"{directory}: {kind}")
    for kind in merge(itertools.chain.from_iterable(result.noted for result in results)):
        noun = "places" if kind.reason == JOINT else "images"
        print(f"{directory}: {kind.count} {noun} noted: {kind.reason} (for example {kind.example})")
    return failed


def list_skipped(directory: Path) -> int:
    """Print shard, key and reason of every sample that the indices of a directory leave out, and every shard that
    could not be indexed.

    Returns:
        Number of shards whose index is missing or damaged.

    Raises:
        DataError: no shards there.
    """
    unknown = 0
    failed = failed_shards(directory)
    for shard in list_shards(directory):
        if shard.name in failed:
            continue
        try:
            arrays = load_index(shard).arrays
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            unknown += 1
            continue
        for key, reason in zip(arrays["skipped_keys"], arrays["skipped_reasons"], strict=True):
            key, reason = (printable(text.decode(errors="replace")) for text in (key, reason))
            print(f"{shard}:{key}: {reason}")
    for reason in failed.values():
        print(f"whole shard: {reason}")
    return unknown
