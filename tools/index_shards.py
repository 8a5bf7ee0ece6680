"""python tools/index_shards.py DIR... [--tokenizer qwen.tiktoken] [--workers N] [--verify-images] [--force]
           [--unparsed-markup leave_out|keep] [--ref-blank outside|inside]

Writes the index of every WebDataset shard (`*.tar`) of the directories, and their manifests. Shards whose index is
current are left alone. Runs in N processes, or over all ranks when started by mpirun or srun (needs mpi4py); under
torchrun rank 0 alone works, in N processes.
`--check` reads every shard and compares its digest instead, `--list-skipped` prints shard, key and reason of every
sample that the indices leave out, and the shards that could not be indexed. `--unparsed-markup` and `--ref-blank`
(docs/samples.md) are kept in the index: they hold for every run over the directory, and when it is indexed again
without them. Exits with 1 when a shard could not be indexed; the others are indexed all the same.
"""

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

from megatron_qwenvl.runtime.interrupt import end_at_stop_signals

if __name__ == "__main__":
    end_at_stop_signals("index_shards")  # before what takes time to import

from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.rendering.tokenizer import load_tokenizer
from megatron_qwenvl.data.shards.directory import failed_shards, indexed_options, list_shards, open_directory
from megatron_qwenvl.data.shards.index import load_index
from megatron_qwenvl.data.shards.indexing import JOINT, IndexJob, ShardResult, index_directory
from megatron_qwenvl.data.shards.skipped import merge, printable
from megatron_qwenvl.runtime.helpers import prepare_worker, start_resource_tracker
from megatron_qwenvl.runtime.interrupt import blocked_stop_signals
from megatron_qwenvl.runtime.output import print_any_name
from megatron_qwenvl.runtime.processes import LaunchError, ProcessInfo, detect_process, load_mpi

SIGNAL_SECONDS = 0.5
"""A signal that ended a worker may be on its way to this process, too."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="directory of *.tar shards")
    parser.add_argument("--tokenizer", help="qwen.tiktoken file; left out: the byte-level vocabulary")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (without MPI)")
    parser.add_argument(
        "--verify-images", action="store_true", help="decode every image, not its header only"
    )
    parser.add_argument("--force", action="store_true", help="index again what is current")
    parser.add_argument(
        "--unparsed-markup",
        choices=("leave_out", "keep"),
        help="dialogues with grounding markup that does not parse; first: leave_out",
    )
    parser.add_argument(
        "--ref-blank",
        choices=("outside", "inside"),
        help="where the blank before a phrase of a grounded caption stands; first: outside",
    )
    look = parser.add_mutually_exclusive_group()
    look.add_argument("--check", action="store_true", help="compare the digests of all shards; write nothing")
    look.add_argument(
        "--list-skipped",
        action="store_true",
        help="print every sample that the indices leave out; write nothing",
    )
    return parser.parse_args()


@contextlib.contextmanager
def executor(workers: int) -> Iterator[Executor | None]:
    """What runs the shards: MPI ranks, a process pool, or a thread of this process.

    None on all ranks but the first; MPI's have worked for it when they come here.

    Raises:
        LaunchError: the launcher contradicts itself, or its ranks cannot work together through mpi4py.
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
    """A pool whose workers all run."""
    start_resource_tracker()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=prepare_worker)
    with blocked_stop_signals():
        for _ in range(workers):
            pool.submit(os.getpid)
    return pool


@contextlib.contextmanager
def mpi_ranks(process: ProcessInfo) -> Iterator[Executor | None]:
    """All ranks as one executor, on rank 0; the others work for it and get None."""
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
    """Prints failures at once, and a line with rate and time left at most every two seconds."""
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


def summarise(directory: Path, results: list[ShardResult]) -> int:
    """Print what a directory holds; the number of shards that failed."""
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


def main() -> int:
    arguments = parse_arguments()
    print_any_name()
    wanted = {"unparsed_markup": arguments.unparsed_markup, "ref_blank": arguments.ref_blank}
    options = {name: value for name, value in wanted.items() if value}
    job = IndexJob(arguments.tokenizer, arguments.verify_images, arguments.force, options)
    failed = 0
    try:
        if arguments.list_skipped:
            return 1 if sum(map(list_skipped, arguments.directories)) else 0
        if arguments.check:
            fingerprint = load_tokenizer(arguments.tokenizer).fingerprint
            for directory in arguments.directories:
                open_directory(directory, fingerprint, verify_digests=True, vocabulary=arguments.tokenizer)
                print(f"{directory}: every shard is as it was indexed")
            return 0
        with executor(arguments.workers) as pool:
            for directory in arguments.directories if pool else ():
                results = index_directory(directory, job, pool, progress(directory))
                failed += summarise(directory, results)
    except (DataError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        time.sleep(SIGNAL_SECONDS)
        print("error: a worker process was killed; perhaps the machine ran out of memory", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
