from __future__ import annotations

import cProfile
import os
import pickle
import random
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.records.tasks import TASKS
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer
from megatron_qwenvl.data.sampling.changes import initial_history, resume_history
from megatron_qwenvl.data.sampling.history import DataHistory
from megatron_qwenvl.data.sampling.mixture import CYCLE, Mixture
from megatron_qwenvl.data.sampling.permutation import permutation
from megatron_qwenvl.data.sampling.resume import resume_data
from megatron_qwenvl.data.sampling.sampler import (
    GlobalBatch,
    StepSampler,
    open_training_sampler,
    open_validation_sampler,
    training_sampler,
)
from megatron_qwenvl.data.sampling.sources import current_training_data, open_training_sources
from megatron_qwenvl.data.sampling.step_description import describe_step
from megatron_qwenvl.data.shards.indexing import IndexJob, index_directory
from tests.unit.data.data_cases import mixed_samples, png_image, run_config, sample, write_source


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_source(path / "a", mixed_samples(90, seed=1))
    write_source(path / "b", mixed_samples(45, seed=2))
    write_source(path / "c", mixed_samples(7, seed=3))
    return path


def sampler_of(config: RunConfig, tokenizer: Tokenizer) -> StepSampler:
    return open_training_sampler(config, tokenizer.fingerprint)


def content(sampler: StepSampler, step: int) -> list[list[str]]:
    """The names of the samples of every pack."""
    batch = sampler.global_batch(step)
    return [[sampler.name(batch.samples, row) for row in pack] for pack in batch.packs]


def names(sampler: StepSampler, batch: GlobalBatch) -> list[str]:
    return [sampler.name(batch.samples, row) for row in range(len(batch.samples))]


# ---- order


def test_mixture_proportions_hold() -> None:
    weights = [280, 0.6, 105, 0.0001]
    mixture = Mixture(weights)
    sources, firsts = mixture.split(0, CYCLE)
    assert firsts == [0, 0, 0, 0]
    counts = np.bincount(sources)
    np.testing.assert_allclose(counts[:3] / CYCLE, np.array(weights[:3]) / sum(weights), atol=1 / CYCLE)
    assert counts[3] == 1
    for first in (0, 30_720, 9 * CYCLE - 17):
        part = np.bincount(mixture.split(first, 30_720)[0], minlength=4)
        np.testing.assert_allclose(part, 30_720 * counts / CYCLE, atol=2)


def test_mixture_counts_what_came_before() -> None:
    mixture = Mixture([3, 1, 2])
    drawn = np.zeros(3, dtype=int)
    for first in range(0, 700, 70):
        sources, firsts = mixture.split(first, 70)
        assert firsts == drawn.tolist()
        drawn += np.bincount(sources, minlength=3)
    assert mixture.split(5 * CYCLE, 1)[1] == [5 * n for n in np.bincount(mixture.split(0, CYCLE)[0])]


def test_permutations_are_fixed_forever() -> None:
    """A changed permutation would break the resume of every run under way."""
    assert permutation(8, "a", 1).tolist() == [1, 4, 0, 7, 6, 5, 3, 2]
    assert sorted(permutation(1000, 5).tolist()) == list(range(1000))
    assert permutation(1000, 5).tolist() != permutation(1000, 6).tolist()


def test_an_epoch_shows_every_sample_once_and_epochs_differ(root: Path, byte_level: Tokenizer) -> None:
    sampler = sampler_of(run_config(root, {"a": 1}, global_batch_size=30), byte_level)
    epochs = [
        [n for step in range(first, first + 3) for n in names(sampler, sampler.global_batch(step))]
        for first in (0, 3)
    ]
    assert len(set(epochs[0])) == 90
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    one_shard = sampler_of(run_config(root, {"c": 1}, global_batch_size=7), byte_level)
    orders = [names(one_shard, one_shard.global_batch(epoch)) for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_shuffling_stays_within_windows(root: Path, byte_level: Tokenizer) -> None:
    sampler = sampler_of(run_config(root, {"a": 1}, global_batch_size=10, shuffle_window=3), byte_level)
    shards = [set(sampler.global_batch(step).samples.shard.tolist()) for step in range(9)]
    windows = [shards[i] | shards[i + 1] | shards[i + 2] for i in (0, 3, 6)]
    assert [len(window) for window in windows] == [3, 3, 3]
    assert set.union(*windows) == set(range(9))
    assert max(len(shard) for shard in shards) > 1


def test_sources_come_in_proportion(root: Path, byte_level: Tokenizer) -> None:
    sampler = sampler_of(run_config(root, {"a": 6, "b": 3, "c": 1}, global_batch_size=100), byte_level)
    for step in range(5):
        counts = np.bincount(sampler.global_batch(step).samples.source, minlength=3)
        np.testing.assert_allclose(counts, [60, 30, 10], atol=2)
        expected, _ = Mixture([6, 3, 1]).split(100 * step, 100)
        assert sampler.global_batch(step).samples.source.tolist() == expected.tolist()
    # The smallest source goes through more epochs, evenly.
    seen = Counter(n for step in range(7) for n in names(sampler, sampler.global_batch(step)) if "/c/" in n)
    assert len(seen) == 7
    assert max(seen.values()) - min(seen.values()) <= 1


# ---- the sampler as a pure function


@pytest.mark.parametrize("packing", ["isolated", "interleaved", "none"])
def test_steps_do_not_depend_on_history_or_process(root: Path, byte_level: Tokenizer, packing: str) -> None:
    config = run_config(root, {"a": 2, "b": 1}, packing=packing)
    sampler = sampler_of(config, byte_level)
    forward = [content(sampler, step) for step in range(12)]
    resumed = sampler_of(config, byte_level)
    assert [content(resumed, step) for step in reversed(range(12))] == forward[::-1]
    elsewhere = pickle.loads(pickle.dumps(sampler))
    assert content(elsewhere, 7) == forward[7]
    assert len(pickle.dumps(sampler)) < 20_000


@pytest.mark.parametrize("packing", ["isolated", "interleaved", "none"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_dealing_divides_the_same_packs(root: Path, byte_level: Tokenizer, packing: str, ranks: int) -> None:
    sampler = sampler_of(run_config(root, {"a": 2, "b": 1}, packing=packing), byte_level)
    for step in range(3):
        batch = sampler.global_batch(step)
        dealt = sampler.balance_across_ranks(batch, ranks)
        assert [len(micro_batches) for micro_batches in dealt] == [
            sampler.micro_batches(batch, ranks)
        ] * ranks
        rows = [len(micro_batch) for micro_batches in dealt for micro_batch in micro_batches]
        assert set(rows) == {sampler.rows(ranks)}
        packs = [
            pack for micro_batches in dealt for micro_batch in micro_batches for pack in micro_batch if pack
        ]
        assert sorted(packs) == sorted(batch.packs)


def test_unpacked_rows_follow_gradient_accumulation(root: Path, byte_level: Tokenizer) -> None:
    sampler = sampler_of(run_config(root, {"a": 1}, packing="none", global_batch_size=24), byte_level)
    assert (sampler.rows(2), sampler.micro_batches(sampler.global_batch(0), 2)) == (4, 3)


def test_seeds_and_names_change_the_order(root: Path, byte_level: Tokenizer) -> None:
    config = run_config(root, {"a": 1})
    orders = {
        tuple(names(sampler, sampler.global_batch(0)))
        for sampler in (
            sampler_of(config.model_copy(update={"seed": seed}), byte_level) for seed in (1, 2, 3)
        )
    }
    assert len(orders) == 3


def test_adding_a_source_keeps_the_order_of_the_others(root: Path, byte_level: Tokenizer) -> None:
    alone = sampler_of(run_config(root, {"a": 1}), byte_level)
    beside = sampler_of(run_config(root, {"b": 1, "a": 1}), byte_level)
    of_a = [n for step in (0, 1) for n in names(beside, beside.global_batch(step)) if "/a/" in n]
    assert of_a == names(alone, alone.global_batch(0))


@pytest.mark.slow
def test_the_work_for_a_large_step_grows_as_its_samples_do(root: Path, byte_level: Tokenizer) -> None:
    """Counted in calls, which unlike seconds are the same on any machine."""

    def calls(batch_size: int) -> int:
        sampler = sampler_of(run_config(root, {"a": 1, "b": 1}, global_batch_size=batch_size), byte_level)
        sampler.global_batch(0)
        profile = cProfile.Profile()
        profile.runcall(lambda: sampler.balance_across_ranks(sampler.global_batch(1), 64))
        return sum(entry.callcount for entry in profile.getstats())

    assert calls(30_720) < 12 * calls(3_072)


# ---- samples that cannot be used


def test_over_long_and_absurd_samples_are_skipped_and_named(tmp_path: Path, byte_level: Tokenizer) -> None:
    samples = mixed_samples(30, tasks=("caption",))
    samples[4] = sample("long", {"task": "text", "text": "x" * 500})
    samples[5] = sample("longer", {"task": "text", "text": "x" * 600})
    samples[17] = sample("large", {"task": "caption", "caption": "x"}, png=png_image(300, 300))
    write_source(tmp_path / "s", samples)
    config = run_config(tmp_path, {"s": 1}, global_batch_size=10, max_image_pixels=80_000)
    sampler = sampler_of(config, byte_level)
    batches = [sampler.global_batch(step) for step in range(6)]
    shown = [n.rpartition(":")[2] for batch in batches for n in names(sampler, batch)]
    assert "long" not in shown
    assert "large" not in shown
    assert len(set(shown[:30])) == 27
    assert max(Counter(shown[:30]).values()) == 2
    for epoch in (batches[:3], batches[3:]):
        skipped = {s.key.rpartition(":")[2]: s.reason for batch in epoch for s in batch.skipped}
        assert sum(len(batch.skipped) for batch in epoch) == 3
        assert skipped == {
            "longer": "601 tokens, at most 256 are allowed",
            "long": "501 tokens, at most 256 are allowed",
            "large": "image of 90000 pixels, at most 80000 are allowed",
        }
    assert sampler_of(config, byte_level).global_batch(3).skipped == batches[3].skipped


def test_a_window_without_a_usable_sample_is_replaced_by_the_next(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    samples = [sample(f"{i:03d}", {"task": "text", "text": "x" * (500 if i < 20 else 20)}) for i in range(30)]
    write_source(tmp_path / "s", samples)
    sampler = sampler_of(run_config(tmp_path, {"s": 1}, global_batch_size=30, shuffle_window=1), byte_level)
    batch = sampler.global_batch(0)
    assert {n.rpartition(":")[2] for n in names(sampler, batch)} == {f"{i:03d}" for i in range(20, 30)}
    assert len(batch.skipped) == 20


def test_a_source_without_a_usable_sample_stops(tmp_path: Path, byte_level: Tokenizer) -> None:
    write_source(tmp_path / "s", [sample("x", {"task": "text", "text": "x" * 500})])
    sampler = sampler_of(run_config(tmp_path, {"s": 1}), byte_level)
    with pytest.raises(DataError, match="s: no sample fits"):
        sampler.global_batch(0)


def test_no_source_stops(tmp_path: Path, byte_level: Tokenizer) -> None:
    with pytest.raises(DataError, match="expected at least one source"):
        sampler_of(run_config(tmp_path, {}), byte_level)


# ---- packs, validation, description


@pytest.mark.parametrize("packing", ["isolated", "interleaved"])
def test_a_mixture_of_all_tasks_fills_packs(root: Path, byte_level: Tokenizer, packing: str) -> None:
    config = run_config(root, {"a": 2, "b": 1}, packing=packing, global_batch_size=4096, pack_length=1024)
    sampler = sampler_of(config, byte_level)
    batch = sampler.global_batch(0)
    assert batch.samples.length.sum() / (1024 * len(batch.packs)) >= 0.95


def test_validation_is_a_fixed_set(root: Path, byte_level: Tokenizer) -> None:
    config = run_config(root, {"a": 1})
    held_out = run_config(root, {"b": 1}).data.sources
    data = config.data.model_copy(update={"validation_sources": held_out})
    train = config.train.model_copy(update={"validation_samples": 20})
    sets = []
    for seed, batch_size in ((1, 24), (2, 8)):
        changed = data.model_copy(update={"global_batch_size": batch_size})
        run = config.model_copy(update={"data": changed, "train": train, "seed": seed})
        sampler = open_validation_sampler(run, byte_level.fingerprint)
        sets.append(names(sampler, sampler.global_batch(0)))
    assert sets[0] == sets[1]
    assert len(set(sets[0])) == 20
    more = train.model_copy(update={"validation_samples": 4096})
    sampler = open_validation_sampler(
        config.model_copy(update={"data": data, "train": more}), byte_level.fingerprint
    )
    assert len(sampler.global_batch(0).samples) == 45


def test_description_of_a_step(root: Path, byte_level: Tokenizer) -> None:
    sampler = sampler_of(run_config(root, {"a": 2, "b": 1}), byte_level)
    described = describe_step(sampler, 5, 3)
    packs = described["packs"]
    assert described["step"] == 5
    batch = sampler.global_batch(5)
    assert {(p["dp_rank"], p["micro_batch"]) for p in packs} == {  # type: ignore[attr-defined]
        (rank, number) for rank in range(3) for number in range(sampler.micro_batches(batch, 3))
    }
    listed = [s for pack in packs for s in pack["samples"]]  # type: ignore[attr-defined]
    expected = [
        {
            "key": sampler.key(batch.samples, row),
            "task": TASKS[batch.samples.task[row]],
            "tokens": int(batch.samples.length[row]),
            "images": int(batch.samples.images[row]),
        }
        for row in range(24)
    ]
    assert sorted(listed, key=str) == sorted(expected, key=str)
    for pack in packs:  # type: ignore[attr-defined]
        assert pack["tokens"] == sum(s["tokens"] for s in pack["samples"])
        assert pack["images"] == sum(s["images"] for s in pack["samples"])


# ---- changes


def test_stand_ins_never_take_the_place_of_a_sample_that_is_to_come(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    """Every usable sample has a place of its own in the epoch, whenever the shards grow in between."""
    rng = random.Random(5)
    samples = [
        sample(f"{i:03d}", {"task": "text", "text": "x" * (500 if rng.random() < 0.4 else 20)})
        for i in range(80)
    ]
    usable = {item["__key__"] for item in samples if len(item["json"]) < 200}
    write_source(tmp_path / "s", samples[:40], per_shard=5)
    config = run_config(tmp_path, {"s": 1}, global_batch_size=4, shuffle_window=2)
    before = sampler_of(config, byte_level)
    first = [before.global_batch(step) for step in range(5)]
    write_source(tmp_path / "s", samples, per_shard=5)
    sources = open_training_sources(config, byte_level.fingerprint)
    history, _ = resume_history(before.history, current_training_data(config, sources), 5)
    after = training_sampler(config, sources, history)
    epoch = first + [after.global_batch(step) for step in range(5, 20)]
    shown = [name.rpartition(":")[2] for batch in epoch for name in names(after, batch)]
    named = [skipped.key.rpartition(":")[2] for batch in epoch for skipped in batch.skipped]
    assert set(shown) == usable
    assert sorted(named) == sorted({item["__key__"] for item in samples} - usable)
    assert pickle.loads(pickle.dumps(after)).global_batch(9).packs == after.global_batch(9).packs


def test_a_rest_without_a_usable_sample_is_filled_from_the_next_epoch(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    good = [sample(f"{i:03d}", {"task": "text", "text": "x" * 20}) for i in range(10)]
    bad = [sample(f"{i:03d}", {"task": "text", "text": "x" * 500}) for i in range(10, 15)]
    write_source(tmp_path / "s", good + bad)
    config = run_config(tmp_path, {"s": 1}, global_batch_size=5)
    now = current_training_data(config, open_training_sources(config, byte_level.fingerprint))
    (whole,) = initial_history(now).editions["s"]
    # As if the ten good ones had been all there was, and were taken, before the bad ones came.
    first = replace(
        whole.shards, names=whole.shards.names[:1], counts=(10,), digests=whole.shards.digests[:1]
    )
    editions = (replace(whole, shards=first), replace(whole, taken=10))
    segment = initial_history(now).segments[0]
    states = (replace(segment.sources[0], edition=1),)
    history = DataHistory((replace(segment, sources=states),), {"s": editions})
    sampler = open_training_sampler(config, byte_level.fingerprint, history=history)
    batch = sampler.global_batch(0)
    assert len(batch.skipped) == 5
    assert {name.rpartition(":")[2] for name in names(sampler, batch)} <= {f"{i:03d}" for i in range(10)}


def test_shards_that_change_while_a_run_starts_are_noticed(tmp_path: Path, byte_level: Tokenizer) -> None:
    write_source(tmp_path / "s", mixed_samples(20))
    config = run_config(tmp_path, {"s": 1})
    history = sampler_of(config, byte_level).history
    write_source(tmp_path / "s", mixed_samples(40))
    with pytest.raises(DataError, match=r"expected the 2 shards that .* record names last, found 4"):
        open_training_sampler(config, byte_level.fingerprint, history=history)


def test_shards_modified_since_they_were_indexed_are_named(tmp_path: Path, byte_level: Tokenizer) -> None:
    directory = write_source(tmp_path / "s", mixed_samples(50))
    config = run_config(tmp_path, {"s": 1})

    def told() -> tuple[str, ...]:
        return resume_data(config, open_training_sources(config, byte_level.fingerprint)).lines

    assert told() == ()
    for number in range(4):
        os.utime(directory / f"{number:06d}.tar", ns=(1, number))
    (line,) = told()
    assert "4 of 5 shards have another modification time" in line
    assert "(000000.tar, 000001.tar, 000002.tar, ...)" in line
    command = shlex.split(line.rpartition("run ")[2])
    assert command[:2] == ["python", "tools/index_shards.py"]
    index_directory(Path(command[2]), IndexJob())  # what the command does
    assert told() == ()


def test_skipped_steps_of_a_recipe(root: Path, byte_level: Tokenizer) -> None:
    plain = sampler_of(run_config(root, {"a": 2, "b": 1}), byte_level)
    sampler = sampler_of(run_config(root, {"a": 2, "b": 1}, skip_steps=((1, 2), (5, 5))), byte_level)
    for step, original in enumerate((0, 3, 4, 6, 7)):
        assert content(sampler, step) == content(plain, original)
