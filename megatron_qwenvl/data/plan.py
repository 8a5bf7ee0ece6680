"""What a step holds, as a pure function of (configuration, seed, step).

`StepPlan.global_batch(k)` does not depend on the number of ranks or workers, nor on which steps were asked for
before; `StepPlan.deal` then says which rank gets what. Both read indices only, never a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_qwenvl.config.schema import RunConfig, SourceConfig

from .cache import LruCache
from .errors import DataError
from .index import ShardIndex
from .manifest import ShardDirectory, open_directory
from .order import Limits, Mixture, SampleTable, Skipped, SourceOrder, hash64
from .packing import CostWeights, Pack, deal, make_packs, pack_costs
from .tasks import TASKS

PACK_MULTIPLE = 64
"""Positions of a pack are a multiple of this (or `pack_length`): divisible by any tensor-parallel size in use."""

MicroBatch = tuple[Pack, ...]  # one pack, or with `packing: none` several rows of at most one sample


@dataclass(frozen=True)
class Source:
    """One opened source of the mixture."""

    config: SourceConfig
    directory: ShardDirectory


def open_sources(
    sources: Sequence[SourceConfig],
    root: str,
    tokenizer: str,
    verify_digests: bool = False,
    vocabulary: str | None = None,
) -> tuple[Source, ...]:
    """Open the directories of a mixture; arguments and errors as `open_directory`.

    Raises:
        DataError: also when there is no source.
    """
    if not sources:
        raise DataError("data: expected at least one source, found none")
    return tuple(
        Source(source, open_directory(Path(root) / source.path, tokenizer, verify_digests, vocabulary))
        for source in sources
    )


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one step and their packs.

    Attributes:
        step: number of the step, from 0.
        samples: the batch in its order.
        packs: rows of `samples`; the same in every layout.
        skipped: samples that the order came to in this step and that cannot be used.
    """

    step: int
    samples: SampleTable
    packs: list[Pack]
    skipped: list[Skipped]


class StepPlan:
    """The batches of a run. Small to send to another process: caches stay behind."""

    def __init__(
        self, config: RunConfig, sources: Sequence[Source], samples_per_step: int, seed: int
    ) -> None:
        data = config.data
        self.data = data
        self.sources = tuple(sources)
        self.samples_per_step = samples_per_step
        self._seed = seed
        self._accumulation = config.train.gradient_accumulation
        self._limits = Limits(
            min(data.max_sample_length, self.row_length), config.model.image_tokens, data.max_image_pixels
        )
        self._start()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in self._caches}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._start()

    _caches = ("_mixture", "_orders", "_indices", "_batches")

    def _start(self) -> None:
        """Everything that is computed on demand."""
        window = self.data.shuffle_window
        # Two windows per source: the one being read and the one being planned.
        self._indices: LruCache[ShardIndex] = LruCache(2 * window * len(self.sources))
        self._batches: LruCache[GlobalBatch] = LruCache(2)
        self._mixture = Mixture([source.config.weight for source in self.sources])
        self._orders = [self._order(number) for number in range(len(self.sources))]

    def _order(self, number: int) -> SourceOrder:
        source = self.sources[number]
        seed = hash64(self._seed, source.config.name)
        return SourceOrder(
            number,
            source.directory,
            self.data.shuffle_window,
            self._limits,
            seed,
            lambda shard: self.index(number, shard),
        )

    @property
    def row_length(self) -> int:
        """Tokens that a pack can hold, or of a padded row."""
        return self.data.max_sample_length if self.data.packing == "none" else self.data.pack_length

    def padded_length(self, filled: int) -> int:
        """Positions of a pack with `filled` tokens: up to the next multiple of `PACK_MULTIPLE`, so that packs
        that the step cannot fill cost little. Padded rows keep their length."""
        if self.data.packing == "none":
            return self.row_length
        return min(self.row_length, max(1, math.ceil(filled / PACK_MULTIPLE)) * PACK_MULTIPLE)

    def positions(self, batch: GlobalBatch, ranks: int) -> int:
        """Decoder positions of a step with padding, empty packs and rows included."""
        rows = self.micro_batches(batch, ranks) * ranks * self.rows(ranks)
        filled = [int(batch.samples.length[list(pack)].sum()) for pack in batch.packs]
        empty = rows - len(filled)
        return sum(map(self.padded_length, filled)) + empty * self.padded_length(0)

    def index(self, source: int, shard: int) -> ShardIndex:
        """Index of a shard, cached.

        Raises:
            DataError: it cannot be read.
        """
        return self._indices.get((source, shard), lambda: self.sources[source].directory.load_index(shard))

    def global_batch(self, step: int) -> GlobalBatch:
        """The batch of a step, cached.

        Raises:
            DataError: an index cannot be read, or a source has no usable sample.
        """
        return self._batches.get(step, lambda: self._make_batch(step))

    def _make_batch(self, step: int) -> GlobalBatch:
        of_source, firsts = self._mixture.split(step * self.samples_per_step, self.samples_per_step)
        counts = np.bincount(of_source, minlength=len(self.sources))
        pieces: list[SampleTable] = []
        skipped: list[Skipped] = []
        for order, first, count in zip(self._orders, firsts, counts.tolist(), strict=True):
            taken, left_out = order.take(first, count)
            pieces += taken
            skipped += left_out
        # The pieces stand source by source; put each sample where the mixture wants its source.
        place = np.empty(len(of_source), dtype=np.int64)
        place[np.argsort(of_source, kind="stable")] = np.arange(len(of_source))
        samples = SampleTable.concatenate(pieces).take(place)
        return GlobalBatch(step, samples, make_packs(samples, self.data.packing, self.row_length), skipped)

    def rows(self, ranks: int) -> int:
        """Packs, or padded rows, of a micro-batch."""
        if self.data.packing != "none":
            return 1
        return max(1, self.data.global_batch_size // (ranks * self._accumulation))

    def micro_batches(self, batch: GlobalBatch, ranks: int) -> int:
        """Micro-batches of each rank; at least one."""
        return max(1, math.ceil(len(batch.packs) / (ranks * self.rows(ranks))))

    def deal(self, batch: GlobalBatch, ranks: int) -> list[list[MicroBatch]]:
        """Micro-batches of each data-parallel rank, `[ranks][micro_batches]`."""
        costs = pack_costs(batch.packs, batch.samples, CostWeights.at(self.data.image_size))
        count = self.micro_batches(batch, ranks)
        dealt = deal(batch.packs, costs, ranks, count * self.rows(ranks))
        # Rows come by falling cost: every `count`-th one makes micro-batches alike.
        return [[tuple(packs[number::count]) for number in range(count)] for packs in dealt]

    def left_out(self) -> list[str]:
        """One line for each kind of reason for which the indices of a source leave samples out."""
        return [
            f"data {source.config.name}: {kind}"
            for source in self.sources
            for kind in source.directory.manifest.skipped
        ]

    def key(self, samples: SampleTable, row: int) -> str:
        """Key of a sample."""
        return self.index(int(samples.source[row]), int(samples.shard[row])).key(int(samples.row[row]))

    def name(self, samples: SampleTable, row: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.shard(samples, row)}:{self.key(samples, row)}"

    def shard(self, samples: SampleTable, row: int) -> str:
        """Path of a sample's shard."""
        directory = self.sources[int(samples.source[row])].directory
        return str(directory.shard_path(int(samples.shard[row])))


def training_plan(config: RunConfig, tokenizer: str, verify_digests: bool = False) -> StepPlan:
    """The plan of a run's training steps.

    Args:
        config: the run.
        tokenizer: fingerprint of its tokenizer.
        verify_digests: compare every shard's digest (slow).

    Raises:
        DataError: see `open_directory`.
    """
    data = config.data
    sources = open_sources(data.sources, data.root, tokenizer, verify_digests, data.tokenizer)
    return StepPlan(config, sources, config.data.global_batch_size, config.seed)


def validation_plan(config: RunConfig, tokenizer: str) -> StepPlan:
    """A plan whose step 0 is the validation set: the first samples of the held-out sources in an order that does
    not depend on the run's seed. Arguments and errors as `training_plan`.
    """
    data = config.data
    sources = open_sources(data.validation_sources, data.root, tokenizer, vocabulary=data.tokenizer)
    available = sum(int(source.directory.counts.sum()) for source in sources)
    return StepPlan(config, sources, min(config.train.validation_samples, available), seed=0)


def describe_step(plan: StepPlan, step: int, ranks: int) -> dict[str, object]:
    """What a step holds, as JSON: `step` and `packs`, a list of `dp_rank`, `micro_batch`, `tokens` and `images`
    (without padding), and `samples`, a list of `key`, `task`, `tokens`, `images`.
    """
    batch = plan.global_batch(step)
    packs = [
        _describe_pack(plan, batch.samples, rank, number, micro_batch)
        for rank, micro_batches in enumerate(plan.deal(batch, ranks))
        for number, micro_batch in enumerate(micro_batches)
    ]
    return {"step": step, "packs": packs}


def _describe_pack(
    plan: StepPlan, samples: SampleTable, rank: int, number: int, micro_batch: MicroBatch
) -> dict[str, object]:
    rows = [row for pack in micro_batch for row in pack]
    described = [
        {
            "key": plan.key(samples, row),
            "task": TASKS[samples.task[row]],
            "tokens": int(samples.length[row]),
            "images": int(samples.images[row]),
        }
        for row in rows
    ]
    return {
        "dp_rank": rank,
        "micro_batch": number,
        "tokens": int(samples.length[rows].sum()),
        "images": int(samples.images[rows].sum()),
        "samples": described,
    }
