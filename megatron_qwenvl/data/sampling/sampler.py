"""The sampler, the front of this room: the batch of step k, and the micro-batches of each rank.

`StepSampler.global_batch(k)` is a pure function of (configuration, seed, k) and of the changes that the run's data has
seen. It depends neither on the number of ranks or workers nor on the steps asked for before.
`StepSampler.balance_across_ranks` then divides the batch. Both read indices only, never a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.lru_cache import LruCache
from megatron_qwenvl.data.shards.index import ShardIndex
from megatron_qwenvl.data.shards.skipped import printable

from .changes import initial_history
from .epochs import ShardList
from .history import DataHistory, Draw, SourceState, Timeline
from .packing import CostWeights, Pack, balance_across_ranks, make_packs, pack_costs
from .sample_table import SampleLimits, SampleTable, Skipped
from .source_sampler import SourceSampler
from .sources import Source, current_data, current_training_data, open_sources, open_training_sources

PACK_MULTIPLE = 64
"""Positions of a pack are a multiple of this (or `pack_length`): divisible by any tensor-parallel size in use."""

MicroBatch = tuple[Pack, ...]  # one pack, or with `packing: none` several rows of at most one sample


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one step and their packs.

    Attributes:
        step: number of the step, from 0.
        samples: the batch in its order.
        packs: rows of `samples`; the same in every parallel layout.
        skipped: samples whose turn came in this step and that are beyond the limits.
    """

    step: int
    samples: SampleTable
    packs: list[Pack]
    skipped: list[Skipped]


class StepSampler:
    """Samples the batches of a run. Small to send to another process: caches stay behind."""

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
        self.history = history or initial_history(
            current_data(sources, samples_per_step, seed, data.shuffle_window)
        )
        self._check_shards()
        self._accumulation = config.train.gradient_accumulation
        self._limits = SampleLimits(
            min(data.max_sample_length, self.row_length), config.model.image_tokens, data.max_image_pixels
        )
        self._start()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name not in self._caches}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._start()

    _caches = ("_timeline", "_source_samplers", "_indices", "_batches")

    def _start(self) -> None:
        """Prepare empty caches of all that is computed on demand."""
        window = self.data.shuffle_window
        # Two windows per source: the one being read and the one being planned.
        self._indices: LruCache[ShardIndex] = LruCache(2 * window * len(self.sources))
        self._batches: LruCache[GlobalBatch] = LruCache(2)
        self._timeline = Timeline(self.history)
        self._source_samplers: dict[tuple[str, int], SourceSampler] = {}

    def _check_shards(self) -> None:
        for source in self.sources:
            edition = self.history.editions[source.config.name][-1]
            if ShardList.of(source.directory) != edition.shards:
                raise DataError(
                    f"{source.directory.path}: expected the {len(edition.shards.names)} shards that the run's data "
                    f"record names last, found {len(source.directory.catalog.shards)} or others; were they changed "
                    "while the run was starting?"
                )

    def _source_sampler(self, state: SourceState) -> SourceSampler:
        """Return the sampler of a source in one of its editions.

        Raises:
            DataError: the configuration no longer has the source.
        """
        names = [source.config.name for source in self.sources]
        if state.name not in names:
            raise DataError(f"data.sources: this step was made with the source {state.name!r}, found {names}")
        if (state.name, state.edition) not in self._source_samplers:
            number = names.index(state.name)
            self._source_samplers[state.name, state.edition] = SourceSampler(
                number,
                self.sources[number].directory,
                self._timeline.editions[state.name],
                state.edition,
                self._limits,
                lambda shard: self.index(number, shard),
            )
        return self._source_samplers[state.name, state.edition]

    @property
    def row_length(self) -> int:
        """Tokens that a pack can hold; without packing, length of a padded row."""
        return self.data.max_sample_length if self.data.packing == "none" else self.data.pack_length

    def padded_length(self, filled: int) -> int:
        """Round the length of a pack with `filled` tokens up to the next multiple of `PACK_MULTIPLE`.

        So packs that the step cannot fill cost little. Padded rows keep their length.
        """
        if self.data.packing == "none":
            return self.row_length
        return min(self.row_length, max(1, math.ceil(filled / PACK_MULTIPLE)) * PACK_MULTIPLE)

    def positions(self, batch: GlobalBatch, ranks: int) -> int:
        """Count the decoder positions of a step, padding, empty packs and empty rows included."""
        rows = self.micro_batches(batch, ranks) * ranks * self.rows(ranks)
        filled = [int(batch.samples.length[list(pack)].sum()) for pack in batch.packs]
        empty = rows - len(filled)
        return sum(map(self.padded_length, filled)) + empty * self.padded_length(0)

    def index(self, source: int, shard: int) -> ShardIndex:
        """Load the index of a shard, or take it from the cache.

        Raises:
            DataError: it cannot be read.
        """
        return self._indices.get((source, shard), lambda: self.sources[source].directory.load_index(shard))

    def global_batch(self, step: int) -> GlobalBatch:
        """Sample the batch of a step, or take it from the cache.

        Raises:
            DataError: an index cannot be read, or a source has no usable sample.
        """
        return self._batches.get(step, lambda: self._make_batch(step))

    def _make_batch(self, step: int) -> GlobalBatch:
        tables: list[SampleTable] = []
        skipped: list[Skipped] = []
        for draw in self._timeline.draws(step):
            table, beyond = self._samples(draw)
            tables.append(table)
            skipped += beyond
        samples = SampleTable.concatenate(tables)
        return GlobalBatch(step, samples, make_packs(samples, self.data.packing, self.row_length), skipped)

    def _samples(self, draw: Draw) -> tuple[SampleTable, list[Skipped]]:
        counts = np.bincount(draw.of_source, minlength=len(draw.sources))
        pieces: list[SampleTable] = []
        skipped: list[Skipped] = []
        for state, count in zip(draw.sources, counts.tolist(), strict=True):
            if count:
                taken, beyond = self._source_sampler(state).take(state.position, count)
                pieces += taken
                skipped += beyond
        # The pieces stand source by source; put each sample where the mixture wants its source.
        place = np.empty(len(draw.of_source), dtype=np.int64)
        place[np.argsort(draw.of_source, kind="stable")] = np.arange(len(draw.of_source))
        return SampleTable.concatenate(pieces).take(place), skipped

    def rows(self, ranks: int) -> int:
        """Number of packs, or of padded rows, in a micro-batch."""
        if self.data.packing != "none":
            return 1
        return max(1, self.data.global_batch_size // (ranks * self._accumulation))

    def micro_batches(self, batch: GlobalBatch, ranks: int) -> int:
        """Number of micro-batches of each rank; at least one."""
        return max(1, math.ceil(len(batch.packs) / (ranks * self.rows(ranks))))

    def balance_across_ranks(self, batch: GlobalBatch, ranks: int) -> list[list[MicroBatch]]:
        """Divide a batch into the micro-batches of each data-parallel rank, `[ranks][micro_batches]`."""
        costs = pack_costs(batch.packs, batch.samples, CostWeights.at(self.data.image_size))
        count = self.micro_batches(batch, ranks)
        by_rank = balance_across_ranks(batch.packs, costs, ranks, count * self.rows(ranks))
        # Rows come by falling cost: taking every `count`-th one balances the micro-batches.
        return [[tuple(packs[number::count]) for number in range(count)] for packs in by_rank]

    def source_notes(self) -> list[str]:
        """Explain in one line each why indices leave samples out, and name rendering options that are not default."""
        notes = []
        for source in self.sources:
            catalog = source.directory.catalog
            options = [f"indexed with {catalog.options}"] if str(catalog.options) else []
            notes += [f"data {source.config.name}: {note}" for note in (*options, *catalog.skipped)]
        return notes

    def key(self, samples: SampleTable, row: int) -> str:
        """Return the key of a sample."""
        return self.index(int(samples.source[row]), int(samples.shard[row])).key(int(samples.row[row]))

    def name(self, samples: SampleTable, row: int) -> str:
        """Return shard and key of a sample, for messages."""
        return f"{self.shard(samples, row)}:{printable(self.key(samples, row))}"

    def shard(self, samples: SampleTable, row: int) -> str:
        """Return the path of a sample's shard."""
        directory = self.sources[int(samples.source[row])].directory
        return str(directory.shard_path(int(samples.shard[row])))


def open_training_sampler(
    config: RunConfig, tokenizer: str, verify_digests: bool = False, history: DataHistory | None = None
) -> StepSampler:
    """Open a run's sources and make the sampler of its training steps.

    Args:
        config: the run.
        tokenizer: fingerprint of its tokenizer.
        verify_digests: compare every shard's digest (slow).
        history: of its data (`resume_data`); none: its data has not changed since it began.

    Raises:
        DataError: see `open_directory`.
    """
    sources = open_training_sources(config, tokenizer, verify_digests)
    return training_sampler(config, sources, history)


def training_sampler(
    config: RunConfig, sources: Sequence[Source], history: DataHistory | None = None
) -> StepSampler:
    """Make the sampler of a run's training steps over opened sources; arguments as `open_training_sampler`."""
    history = history or initial_history(current_training_data(config, sources))
    return StepSampler(config, sources, config.data.global_batch_size, config.seed, history)


def open_validation_sampler(config: RunConfig, tokenizer: str) -> StepSampler:
    """Open the validation sources and make a sampler whose step 0 is the validation set.

    These are the first samples of the sources in an order that does not depend on the run's seed. Arguments and errors
    as `open_training_sampler`.
    """
    data = config.data
    sources = open_sources(data.validation_sources, data.root, tokenizer, vocabulary=data.tokenizer)
    available = sum(int(source.directory.counts.sum()) for source in sources)
    return StepSampler(config, sources, min(config.train.validation_samples, available), seed=0)
