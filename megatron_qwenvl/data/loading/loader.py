"""The micro-batches of a rank, step after step, read and decoded by worker processes ahead of the step.

Nothing is carried from one micro-batch to the next, so the number of workers changes the speed only.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_qwenvl.batch import Batch, DataNeeds
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.lru_cache import LruCache
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer, load_decoder_tokenizer
from megatron_qwenvl.data.sampling.sample_table import Skipped
from megatron_qwenvl.data.sampling.sampler import (
    MicroBatch,
    StepSampler,
    open_training_sampler,
    open_validation_sampler,
)
from megatron_qwenvl.runtime.retry import retry_read

from .collate import collate
from .reader import SampleReader
from .workers import hidden_main, worker_arguments

Key = tuple[int, int]  # step, micro-batch


@dataclass(frozen=True)
class StepInfo:
    """Numbers of a step over all data-parallel ranks, known before any sample is read.

    Attributes:
        step: number of the step, from 0.
        micro_batches: number for each rank.
        samples, images: number in the global batch.
        tokens: decoder positions without padding.
        positions: decoder positions with padding.
        skipped: samples whose turn came in this step and that are beyond the limits (too long, too large).
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
        """Share of the positions that are padding."""
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
        """Iterate over the micro-batches; possible once.

        Raises:
            DataError: a shard cannot be read or differs from its index.
        """
        return self._batches

    def sample_names(self) -> list[str]:
        """Return shard and key of every sample of this rank, for logging."""
        return self._names()


class StepLoader:
    """Iterates over the steps of one data-parallel rank; every iteration starts at the first step again."""

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
        """Yield the steps in order; micro-batches of a step that were not taken are dropped when the next step is.

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
        """Count the content of a step."""
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
        """Iterate over all micro-batches of all steps; workers prepare them ahead in the same order."""
        data = self.sampler.data
        workers = data.workers if self._micro_batches.reads else 0
        parallel: dict[str, Any] = {}
        if workers:
            parallel, alive = worker_arguments([__name__])
            # A step starts when all its micro-batches are there, so a whole step must fit into what is prefetched.
            micro_batches = self.info(self.steps[0]).micro_batches if self.steps else 0
            parallel["prefetch_factor"] = max(data.prefetch, math.ceil(micro_batches / workers))
        loader = DataLoader(
            self._micro_batches,
            sampler=self._keys(),
            batch_size=None,
            num_workers=workers,
            pin_memory=self._pin_memory,
            generator=torch.Generator(),  # the default would draw from the model's random numbers
            **parallel,
        )
        with hidden_main():
            iterator = iter(loader)
        if workers:
            # Also at the exit of this process, and before it waits for its workers to end.
            multiprocessing.util.Finalize(iterator, alive.close, exitpriority=0)
        return iterator


class _MicroBatches(Dataset[Any]):
    """Random access to the micro-batches of a rank; sent to every worker process."""

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
        self._patience = retry_read.seconds
        self._micro_batches: LruCache[list[MicroBatch]] = LruCache(2)

    def __getitem__(self, key: Key) -> Batch | DataError:
        """Read a micro-batch; an error is returned, as an exception would lose its type on the way from a worker."""
        step, number = key
        retry_read.seconds = self._patience  # a worker is another process
        try:
            samples = self._sampler.global_batch(step).samples
            batch = collate(self._of_rank(step)[number], samples, self._reader, self._needs)
            return replace(batch, repeated_reads=retry_read.take())
        except DataError as error:
            return error

    def names(self, step: int) -> list[str]:
        """Return shard and key of every sample of this rank in a step."""
        samples = self._sampler.global_batch(step).samples
        packs = itertools.chain.from_iterable(self._of_rank(step))
        return [self._sampler.name(samples, row) for pack in packs for row in pack]

    def _of_rank(self, step: int) -> list[MicroBatch]:
        sampler = self._sampler
        return self._micro_batches.get(
            step, lambda: sampler.balance_across_ranks(sampler.global_batch(step), self._ranks)[self._rank]
        )


def _raise_errors(batches: Iterable[Batch | DataError]) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


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
    """Build the loader of one rank.

    Args:
        config: the run.
        tokenizer: the vocabulary; None: that of `config.data.tokenizer`.
        dp_rank: data-parallel rank.
        dp_size: data-parallel size.
        needs: what the rank's pipeline stage reads; None: everything.
        first_step: number of the first step, from 0: as many as are done.
        split: `train`: steps `first_step..config.train.steps`. `validation`: one step, which is the whole
            validation set in its fixed order.
        sampler: of the training steps; None: that of a run whose data has not changed since it began.
        pin_memory: copy batches to page-locked memory (GPU runs).

    Raises:
        DataError: a directory, shard, index or tokenizer that does not fit.
    """
    tokenizer = tokenizer or load_decoder_tokenizer(config)
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
