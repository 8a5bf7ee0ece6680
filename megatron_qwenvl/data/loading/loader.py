"""The micro-batches of a rank, step after step, read and decoded by worker processes ahead of the step.

Workers are started by a fork server that has imported this package and nothing else: forking the training
process itself would copy its threads' locks and its process groups in whatever state they are, and `spawn`
would import torch once for every worker. Nothing is carried from one micro-batch to the next, so the number of
workers changes the speed only.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_qwenvl.batch import Batch, DataNeeds
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.lru_cache import LruCache
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer, load_tokenizer
from megatron_qwenvl.data.sampling.mixture import Skipped
from megatron_qwenvl.data.sampling.sampler import (
    MicroBatch,
    StepSampler,
    open_training_sampler,
    open_validation_sampler,
)
from megatron_qwenvl.runtime.helpers import start_resource_tracker
from megatron_qwenvl.runtime.interrupt import blocked_stop_signals, ignore_stop_signals
from megatron_qwenvl.runtime.retry import reads

from .collate import collate
from .reader import SampleReader

Key = tuple[int, int]  # step, micro-batch


@dataclass(frozen=True)
class StepInfo:
    """What a step holds over all data-parallel ranks, known before anything is read.

    Attributes:
        step: number of the step, from 0.
        micro_batches: of each rank.
        samples, images: in the global batch.
        tokens: decoder positions without padding.
        positions: decoder positions with padding.
        skipped: samples that the order came to in this step and that cannot be used (too long, too large).
    """

    step: int
    micro_batches: int
    samples: int
    images: int
    tokens: int
    positions: int
    skipped: tuple[Skipped, ...]

    @property
    def padding(self) -> float:
        """Share of positions that are padding."""
        return 1 - self.tokens / self.positions


class Step:
    """One step of this rank: its information, and an iterator over its micro-batches."""

    def __init__(self, info: StepInfo, batches: Iterator[Batch], names: Callable[[], list[str]]) -> None:
        self.info = info
        self._batches = batches
        self._names = names

    def __len__(self) -> int:
        return self.info.micro_batches

    def __iter__(self) -> Iterator[Batch]:
        """The micro-batches, once.

        Raises:
            DataError: a shard cannot be read or differs from its index.
        """
        return self._batches

    def sample_names(self) -> list[str]:
        """Shard and key of every sample of this rank's part, for logging."""
        return self._names()


class StepLoader:
    """The steps of one data-parallel rank. Every iteration starts at the first step again."""

    def __init__(
        self,
        sampler: StepSampler,
        steps: range,
        micro_batches: _MicroBatches,
        rank_count: int,
        pin_memory: bool,
    ) -> None:
        self.sampler = sampler
        self.steps = steps
        self._micro_batches = micro_batches
        self._ranks = rank_count
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        """The steps in order; what is not taken of a step's micro-batches is dropped when the next one is asked.

        Raises:
            DataError: an index cannot be read, or a source has no usable sample.
        """
        stream = self._stream()
        for step in self.steps:
            info = self.info(step)
            batches = itertools.islice(stream, info.micro_batches)
            yield Step(info, _raise_errors(batches), functools.partial(self._micro_batches.names, step))
            for _ in batches:
                pass

    def info(self, step: int) -> StepInfo:
        """What a step holds."""
        batch = self.sampler.global_batch(step)
        count = self.sampler.micro_batches(batch, self._ranks)
        return StepInfo(
            step=step,
            micro_batches=count,
            samples=len(batch.samples),
            images=int(batch.samples.images.sum()),
            tokens=int(batch.samples.length.sum()),
            positions=self.sampler.positions(batch, self._ranks),
            skipped=tuple(batch.skipped),
        )

    def _keys(self) -> Iterator[Key]:
        for step in self.steps:
            batch = self.sampler.global_batch(step)
            for number in range(self.sampler.micro_batches(batch, self._ranks)):
                yield step, number

    def _stream(self) -> Iterator[Batch | DataError]:
        """All micro-batches of all steps; with workers, prepared ahead in the same order."""
        data = self.sampler.data
        workers = data.workers if self._micro_batches.reads else 0
        parallel: dict[str, Any] = {}
        if workers:
            lifeline, alive = multiprocessing.Pipe(duplex=False)
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__, f"{__package__}.fork_server"])
            _start_helpers()
            # A step starts when all its micro-batches are there, so a whole step must fit into what is ahead.
            ahead = max(
                data.prefetch, -(-self.info(self.steps[0]).micro_batches // workers) if self.steps else 0
            )
            parallel = {
                "multiprocessing_context": context,
                "prefetch_factor": ahead,
                "worker_init_fn": functools.partial(_prepare_worker, lifeline),
            }
        loader = DataLoader(
            self._micro_batches,
            sampler=self._keys(),
            batch_size=None,
            num_workers=workers,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # the default would draw from the model's random numbers
            **parallel,
        )
        with _hidden_main():
            iterator = iter(loader)
        if workers:
            # Also at the exit of this process, and before it waits for its workers to end.
            multiprocessing.util.Finalize(iterator, alive.close, exitpriority=0)
        return iterator


class _MicroBatches(Dataset[Any]):
    """Random access to the micro-batches of a rank; what a worker process gets."""

    def __init__(
        self,
        sampler: StepSampler,
        tokenizer: Tokenizer,
        image_tokens: int,
        needs: DataNeeds,
        rank: int,
        ranks: int,
    ) -> None:
        self._sampler = sampler
        self.reads = needs.pixels or needs.tokens
        self._reader = SampleReader(sampler, tokenizer, image_tokens)
        self._needs = needs
        self._rank = rank
        self._ranks = ranks
        self._patience = reads.seconds
        self._dealt: LruCache[list[MicroBatch]] = LruCache(2)

    def __getitem__(self, key: Key) -> Batch | DataError:
        """A micro-batch, or what keeps it from being read: an exception would lose its type on the way here."""
        step, number = key
        reads.seconds = self._patience  # a worker is another process
        try:
            samples = self._sampler.global_batch(step).samples
            batch = collate(self._part(step)[number], samples, self._reader, self._needs)
            return replace(batch, read_again=reads.take())
        except DataError as error:
            return error

    def names(self, step: int) -> list[str]:
        """Shard and key of every sample of this rank in a step."""
        samples = self._sampler.global_batch(step).samples
        packs = itertools.chain.from_iterable(self._part(step))
        return [self._sampler.name(samples, row) for pack in packs for row in pack]

    def _part(self, step: int) -> list[MicroBatch]:
        sampler = self._sampler
        return self._dealt.get(
            step, lambda: sampler.balance_across_ranks(sampler.global_batch(step), self._ranks)[self._rank]
        )


def _raise_errors(batches: Iterable[Batch | DataError]) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _start_helpers() -> None:
    """Start multiprocessing's own helper processes where a signal to every process of a job does not end them: without
    fork server there are no workers."""
    start_resource_tracker()
    with blocked_stop_signals():
        forkserver.ensure_running()


def _prepare_worker(lifeline: Connection, _: int) -> None:
    """Let this worker end with the loader that uses it, whose process holds the other end of `lifeline`, and with
    nothing else.

    Torch's own watch looks at the worker's parent, which is the fork server, and that one lives as long as a worker.
    Torch and Python also end a worker by SIGTERM, but Slurm sends that to every process of a job, and the training
    process still wants its batches to finish a step and save.
    """
    ignore_stop_signals()

    def watch() -> None:
        multiprocessing.connection.wait([lifeline])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Start processes that do not import the training program again, which takes longer than all the rest."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def build_loader(
    config: RunConfig,
    *,
    tokenizer: Tokenizer | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
    needs: DataNeeds | None = None,
    first_step: int = 0,
    split: Literal["train", "validation"] = "train",
    sampler: StepSampler | None = None,
    pin_memory: bool = False,
) -> StepLoader:
    """The loader of one rank.

    Args:
        config: the run.
        tokenizer: none: that of `config.data.tokenizer`.
        dp_rank: data-parallel rank.
        dp_size: data-parallel size.
        needs: what the rank's pipeline stage reads; none: everything.
        first_step: where to go on, counted from 0: the number of steps that are done.
        split: `train`: steps `first_step..config.train.steps`. `validation`: one step, which is the whole
            validation set in its fixed order.
        sampler: of the training steps; none: that of a run whose data has not changed since it began.
        pin_memory: copy batches to page-locked memory (GPU runs).

    Raises:
        DataError: a directory, shard, index or tokenizer that does not fit.
    """
    tokenizer = tokenizer or load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.decoder.vocab_size:
        raise DataError(
            f"tokenizer {config.data.tokenizer or 'bytes'}: {tokenizer.vocab_size} tokens do not fit "
            f"model.decoder.vocab_size {config.model.decoder.vocab_size}"
        )
    if split == "train":
        sampler = sampler or open_training_sampler(config, tokenizer.fingerprint)
        steps = range(first_step, config.train.steps)
    else:
        sampler, steps = open_validation_sampler(config, tokenizer.fingerprint), range(1)
    micro_batches = _MicroBatches(
        sampler, tokenizer, config.model.image_tokens, needs or DataNeeds(), dp_rank, dp_size
    )
    return StepLoader(sampler, steps, micro_batches, dp_size, pin_memory)
