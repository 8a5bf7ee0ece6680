"""What a step holds, as a pure function of (configuration, seed, step) and of the changes that the data has seen.

`StepSampler.global_batch(k)` does not depend on the number of ranks or workers, nor on which steps were asked for
before; `StepSampler.balance_across_ranks` then says which rank gets what. Both read indices only, never a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_qwenvl.config.schema import RunConfig, SourceConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.lru_cache import LruCache
from megatron_qwenvl.data.records.tasks import TASKS
from megatron_qwenvl.data.shards.directory import ShardDirectory, open_directory
from megatron_qwenvl.data.shards.index import ShardIndex
from megatron_qwenvl.data.shards.skipped import printable

from .changes import DataNow, SourceNow, begin
from .epochs import ShardList
from .history import DataHistory, Draw, SourceState, StepRange, Timeline
from .mixture import Limits, SampleTable, Skipped
from .packing import CostWeights, Pack, balance_across_ranks, make_packs, pack_costs
from .source_sampler import SourceSampler

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


class StepSampler:
    """The batches of a run. Small to send to another process: caches stay behind."""

    def __init__(
        self,
        config: RunConfig,
        sources: Sequence[Source],
        samples_per_step: int,
        seed: int,
        history: DataHistory | None = None,
    ) -> None:
        """
        Args:
            config: the run.
            sources: its opened sources, or those of its validation.
            samples_per_step: batch size.
            seed: of the order.
            history: of the run's data; none: it begins with step 0 and has not changed since.

        Raises:
            DataError: a source has other shards than the history says.
        """
        data = config.data
        self.data = data
        self.sources = tuple(sources)
        self.history = history or begin(data_now(sources, samples_per_step, seed, data.shuffle_window))
        self._check_shards()
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

    _caches = ("_timeline", "_orders", "_indices", "_batches")

    def _start(self) -> None:
        """Everything that is computed on demand."""
        window = self.data.shuffle_window
        # Two windows per source: the one being read and the one being planned.
        self._indices: LruCache[ShardIndex] = LruCache(2 * window * len(self.sources))
        self._batches: LruCache[GlobalBatch] = LruCache(2)
        self._timeline = Timeline(self.history)
        self._orders: dict[tuple[str, int], SourceSampler] = {}

    def _check_shards(self) -> None:
        for source in self.sources:
            edition = self.history.editions[source.config.name][-1]
            if ShardList.of(source.directory) != edition.shards:
                raise DataError(
                    f"{source.directory.path}: expected the {len(edition.shards.names)} shards that the run's data "
                    f"record names last, found {len(source.directory.manifest.shards)} or others; were they changed "
                    "while the run was starting?"
                )

    def _order(self, state: SourceState) -> SourceSampler:
        """The order of a source in one of its editions.

        Raises:
            DataError: the configuration does not have the source any more.
        """
        names = [source.config.name for source in self.sources]
        if state.name not in names:
            raise DataError(f"data.sources: this step was made with the source {state.name!r}, found {names}")
        if (state.name, state.edition) not in self._orders:
            number = names.index(state.name)
            self._orders[state.name, state.edition] = SourceSampler(
                number,
                self.sources[number].directory,
                self._timeline.editions[state.name],
                state.edition,
                self._limits,
                lambda shard: self.index(number, shard),
            )
        return self._orders[state.name, state.edition]

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
        tables: list[SampleTable] = []
        skipped: list[Skipped] = []
        for draw in self._timeline.draws(step):
            table, left_out = self._samples(draw)
            tables.append(table)
            skipped += left_out
        samples = SampleTable.concatenate(tables)
        return GlobalBatch(step, samples, make_packs(samples, self.data.packing, self.row_length), skipped)

    def _samples(self, draw: Draw) -> tuple[SampleTable, list[Skipped]]:
        counts = np.bincount(draw.of_source, minlength=len(draw.sources))
        pieces: list[SampleTable] = []
        skipped: list[Skipped] = []
        for state, count in zip(draw.sources, counts.tolist(), strict=True):
            if count:
                taken, left_out = self._order(state).take(state.position, count)
                pieces += taken
                skipped += left_out
        # The pieces stand source by source; put each sample where the mixture wants its source.
        place = np.empty(len(draw.of_source), dtype=np.int64)
        place[np.argsort(draw.of_source, kind="stable")] = np.arange(len(draw.of_source))
        return SampleTable.concatenate(pieces).take(place), skipped

    def rows(self, ranks: int) -> int:
        """Packs, or padded rows, of a micro-batch."""
        if self.data.packing != "none":
            return 1
        return max(1, self.data.global_batch_size // (ranks * self._accumulation))

    def micro_batches(self, batch: GlobalBatch, ranks: int) -> int:
        """Micro-batches of each rank; at least one."""
        return max(1, math.ceil(len(batch.packs) / (ranks * self.rows(ranks))))

    def balance_across_ranks(self, batch: GlobalBatch, ranks: int) -> list[list[MicroBatch]]:
        """Micro-batches of each data-parallel rank, `[ranks][micro_batches]`."""
        costs = pack_costs(batch.packs, batch.samples, CostWeights.at(self.data.image_size))
        count = self.micro_batches(batch, ranks)
        dealt = balance_across_ranks(batch.packs, costs, ranks, count * self.rows(ranks))
        # Rows come by falling cost: every `count`-th one makes micro-batches alike.
        return [[tuple(packs[number::count]) for number in range(count)] for packs in dealt]

    def source_notes(self) -> list[str]:
        """One line for each kind of reason for which the indices of a source leave samples out, and one for options."""
        notes = []
        for source in self.sources:
            manifest = source.directory.manifest
            options = [f"indexed with {manifest.options}"] if str(manifest.options) else []
            notes += [f"data {source.config.name}: {note}" for note in (*options, *manifest.skipped)]
        return notes

    def key(self, samples: SampleTable, row: int) -> str:
        """Key of a sample."""
        return self.index(int(samples.source[row]), int(samples.shard[row])).key(int(samples.row[row]))

    def name(self, samples: SampleTable, row: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.shard(samples, row)}:{printable(self.key(samples, row))}"

    def shard(self, samples: SampleTable, row: int) -> str:
        """Path of a sample's shard."""
        directory = self.sources[int(samples.source[row])].directory
        return str(directory.shard_path(int(samples.shard[row])))


def data_now(
    sources: Sequence[Source],
    samples_per_step: int,
    seed: int,
    window: int,
    skip_steps: Sequence[StepRange] = (),
) -> DataNow:
    """All that the order of samples depends on: of opened sources, and of the configuration."""
    opened = (
        SourceNow(source.config.name, source.config.weight, ShardList.of(source.directory))
        for source in sources
    )
    return DataNow(samples_per_step, tuple(opened), seed, window, tuple(skip_steps))


def training_data(config: RunConfig, sources: Sequence[Source]) -> DataNow:
    """The same of a run's training data."""
    data = config.data
    return data_now(sources, data.global_batch_size, config.seed, data.shuffle_window, data.skip_steps)


def open_training_sources(
    config: RunConfig, tokenizer: str, verify_digests: bool = False
) -> tuple[Source, ...]:
    """Open a run's training sources; arguments and errors as `open_directory`."""
    data = config.data
    return open_sources(data.sources, data.root, tokenizer, verify_digests, data.tokenizer)


def open_training_sampler(
    config: RunConfig, tokenizer: str, verify_digests: bool = False, history: DataHistory | None = None
) -> StepSampler:
    """The sampler of a run's training steps.

    Args:
        config: the run.
        tokenizer: fingerprint of its tokenizer.
        verify_digests: compare every shard's digest (slow).
        history: of its data (`training_history`); none: its data has not changed since it began.

    Raises:
        DataError: see `open_directory`.
    """
    sources = open_training_sources(config, tokenizer, verify_digests)
    return training_sampler(config, sources, history)


def training_sampler(
    config: RunConfig, sources: Sequence[Source], history: DataHistory | None = None
) -> StepSampler:
    """The sampler of a run's training steps over sources that are open; arguments as `open_training_sampler`."""
    history = history or begin(training_data(config, sources))
    return StepSampler(config, sources, config.data.global_batch_size, config.seed, history)


def open_validation_sampler(config: RunConfig, tokenizer: str) -> StepSampler:
    """A sampler whose step 0 is the validation set: the first samples of the held-out sources in an order that does
    not depend on the run's seed. Arguments and errors as `open_training_sampler`.
    """
    data = config.data
    sources = open_sources(data.validation_sources, data.root, tokenizer, vocabulary=data.tokenizer)
    available = sum(int(source.directory.counts.sum()) for source in sources)
    return StepSampler(config, sources, min(config.train.validation_samples, available), seed=0)


def describe_step(sampler: StepSampler, step: int, ranks: int) -> dict[str, object]:
    """What a step holds, as JSON: `step` and `packs`, a list of `dp_rank`, `micro_batch`, `tokens` and `images`
    (without padding), and `samples`, a list of `key`, `task`, `tokens`, `images`.
    """
    batch = sampler.global_batch(step)
    packs = [
        _describe_pack(sampler, batch.samples, rank, number, micro_batch)
        for rank, micro_batches in enumerate(sampler.balance_across_ranks(batch, ranks))
        for number, micro_batch in enumerate(micro_batches)
    ]
    return {"step": step, "packs": packs}


def _describe_pack(
    sampler: StepSampler, samples: SampleTable, rank: int, number: int, micro_batch: MicroBatch
) -> dict[str, object]:
    rows = [row for pack in micro_batch for row in pack]
    described = [
        {
            "key": sampler.key(samples, row),
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
