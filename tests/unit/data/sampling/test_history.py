"""Changes of a run's data against a model that only remembers which samples were seen in this epoch."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.sampling.changes import CurrentData, CurrentSource, initial_history, resume_history
from megatron_qwenvl.data.sampling.epochs import Edition, Editions, ShardList
from megatron_qwenvl.data.sampling.history import DataHistory, Timeline
from megatron_qwenvl.data.sampling.history_file import decode_history, encode_history

Sample = tuple[str, str, int]
"""Source, shard, row."""


def shards(counts: dict[str, int], rewritten: tuple[str, ...] = ()) -> ShardList:
    names = sorted(counts)
    return ShardList(
        tuple(names),
        tuple(counts[name] for name in names),
        tuple(f"digest of {name}{'!' * (name in rewritten)}" for name in names),
    )


def numbered(first: int, last: int, count: int = 4) -> dict[str, int]:
    return {f"{number:03d}.tar": count for number in range(first, last)}


def one_source(counts: dict[str, int], batch: int = 4, **settings: int) -> CurrentData:
    return CurrentData(
        batch, (CurrentSource("s", 1.0, shards(counts)),), settings.get("seed", 7), settings.get("window", 2)
    )


def samples_of(timeline: Timeline, step: int) -> list[Sample]:
    """The samples of a step, by counts alone; each source's in its order."""
    found = []
    for draw in timeline.draws(step):
        for number, state in enumerate(draw.sources):
            taken = int((draw.of_source == number).sum())
            editions = timeline.editions[state.name]
            for position in range(state.position, state.position + taken):
                found.append((state.name, *sample_at(editions, state.edition, position)))
    return found


def sample_at(editions: Editions, edition: int, position: int) -> tuple[str, int]:
    number, place = editions.place(edition, position)
    epoch, listed = editions.epoch(edition, number), editions[edition].shards
    window = epoch.window_at(place)
    row = int(epoch.order_of(window)[place - epoch.starts[window]])
    for shard in epoch.shards_of(window):
        rows = epoch.rows.get(shard)
        count = listed.counts[shard] if rows is None else len(rows)
        if row < count:
            return listed.names[shard], row if rows is None else int(rows[row])
        row -= count
    raise AssertionError("a place without a sample")


def steps_of(history: DataHistory, first: int, last: int) -> list[Sample]:
    timeline = Timeline(history)
    return [sample for step in range(first, last) for sample in samples_of(timeline, step)]


def sources_of(history: DataHistory, first: int, last: int) -> list[int]:
    """The source of every sample of some steps, as the mixture mixes them."""
    timeline = Timeline(history)
    return [
        int(source)
        for step in range(first, last)
        for draw in timeline.draws(step)
        for source in draw.of_source
    ]


def everything(counts: dict[str, int]) -> set[Sample]:
    return {("s", shard, row) for shard, count in counts.items() for row in range(count)}


def lines(history: DataHistory, now: CurrentData, step: int) -> list[str]:
    return [change.text for change in resume_history(history, now, step)[1]]


# ---- single changes


def test_nothing_changed_is_the_same_history() -> None:
    now = one_source(numbered(0, 8))
    history = initial_history(now)
    assert resume_history(history, now, 5) == (history, [])
    assert resume_history(history, now, 0) == (history, [])


def test_added_shards_come_in_this_epoch_and_no_sample_twice() -> None:
    small, large = numbered(0, 8), numbered(0, 16)
    before = initial_history(one_source(small))
    history, changes = resume_history(before, one_source(large), 4)
    assert [change.text for change in changes] == [
        "data set s: 8 shards (008.tar, 009.tar, 010.tar, ...) added (32 samples): part of this epoch from step 4 on"
    ]
    seen = steps_of(history, 0, 4)
    assert seen == steps_of(before, 0, 4)
    rest = steps_of(history, 4, 16)
    assert Counter(seen + rest) == Counter(everything(large))
    assert any(shard >= "008.tar" for _, shard, _ in steps_of(history, 4, 8))
    plain = initial_history(one_source(large))
    assert steps_of(history, 16, 32) == steps_of(plain, 16, 32)  # the next epoch in its plain order


@pytest.mark.parametrize("window", [1, 2, 3, 20])
def test_removed_shards_miss_only_their_own_samples(window: int) -> None:
    large = numbered(0, 16)
    small = {name: count for name, count in large.items() if int(name[:3]) % 3}
    before = initial_history(one_source(large, batch=5, window=window))
    history, _ = resume_history(before, one_source(small, batch=5, window=window), 5)
    seen = steps_of(before, 0, 5)
    left = everything(small) - set(seen)
    rest = steps_of(history, 5, 5 + len(left) // 5)
    assert len(rest) == len(set(rest)) and set(rest) <= left
    following = steps_of(history, 5 + len(left) // 5, 6 + len(left) // 5)
    assert set(rest) | set(following[: len(left) % 5]) == left
    (line,) = lines(before, one_source(small, batch=5, window=window), 5)
    gone = everything(large) - everything(small)
    assert f"{len(gone)} samples, {len(gone - set(seen))} of them not seen in this epoch" in line


def test_another_batch_size_cuts_the_same_samples_otherwise() -> None:
    two = (CurrentSource("a", 3.0, shards(numbered(0, 9))), CurrentSource("b", 1.0, shards(numbered(0, 5))))
    now = CurrentData(4, two, 1, 2)
    before = initial_history(now)
    history, changes = resume_history(before, replace(now, samples_per_step=10), 5)
    assert [change.text for change in changes] == [
        "data.global_batch_size: was 4, now 10 from step 5 on; 20 samples were consumed, and the next "
        "step goes on after them"
    ]
    assert Counter(steps_of(history, 0, 13)) == Counter(steps_of(before, 0, 25))
    assert Timeline(history).consumed(13) == Timeline(before).consumed(25) == {"a": 75, "b": 25}
    # Also where the change falls into the middle of the mixture's pattern.
    uneven = replace(now, sources=(replace(two[0], weight=2.3), two[1]))
    before = initial_history(uneven)
    history, _ = resume_history(before, replace(uneven, samples_per_step=7), 5)
    assert sources_of(history, 0, 25)[: 20 + 7 * 10] == sources_of(before, 0, 25)[: 20 + 7 * 10]
    assert len(samples_of(Timeline(history), 4)) == 4


def test_other_weights_lose_and_repeat_nothing() -> None:
    sizes = {"a": numbered(0, 9), "b": numbered(0, 6)}

    def now(a: float, b: float) -> CurrentData:
        return CurrentData(
            8, (CurrentSource("a", a, shards(sizes["a"])), CurrentSource("b", b, shards(sizes["b"]))), 1, 2
        )

    before = initial_history(now(1, 1))
    history, changes = resume_history(before, now(3, 1), 3)
    assert [change.text for change in changes] == [
        "data mixture: was a 50.00%, b 50.00%, now a 75.00%, b 25.00% from step 3 on; every source goes on in its "
        "own order of samples after those that it has given"
    ]
    came = steps_of(history, 0, 7)
    assert Counter(name for name, _, _ in came) == {"a": 12 + 24, "b": 12 + 8}
    assert len(set(came)) == len(came)
    assert resume_history(before, now(2, 2), 3) == (before, [])  # the same shares


def test_sources_by_name_in_any_order_new_dropped_and_back() -> None:
    sources = [CurrentSource(name, 1.0, shards(numbered(0, 6))) for name in "abc"]
    both, three = CurrentData(4, tuple(sources[:2]), 1, 2), CurrentData(4, tuple(sources), 1, 2)
    history = initial_history(both)
    assert resume_history(history, replace(both, sources=tuple(sources[1::-1])), 3) == (history, [])
    more, changes = resume_history(history, three, 3)
    assert "data set c: new (24 samples): its first epoch begins at step 3" in changes[0].text
    less, changes = resume_history(more, replace(both, sources=(sources[2],)), 6)
    assert [change.text.split(";")[0] for change in changes[:2]] == [
        f"data set {name}: dropped: it ends at step 6 after {6 + 4} samples, and goes on there if it comes back"
        for name in "ab"
    ]
    back, changes = resume_history(less, both, 8)
    assert "data set a: back: from step 8 on it goes on after the 10 samples given" in changes[0].text
    assert any("data set c: dropped" in change.text for change in changes)
    of_a = [sample for sample in steps_of(back, 0, 15) if sample[0] == "a"]
    alone = initial_history(replace(both, sources=(sources[0],)))
    assert of_a == steps_of(alone, 0, 6)


@pytest.mark.parametrize(
    ("field", "settings"), [("seed", {"seed": 8}), ("data.shuffle_window", {"window": 3})]
)
def test_another_seed_or_window_keeps_the_epoch_exact(field: str, settings: dict[str, int]) -> None:
    counts = numbered(0, 10)
    before = initial_history(one_source(counts))
    history, changes = resume_history(before, one_source(counts, **settings), 4)
    assert [change.text.split(":")[0] for change in changes] == [field]
    assert Counter(steps_of(history, 0, 10)) == Counter(everything(counts))
    assert steps_of(history, 10, 30) == steps_of(initial_history(one_source(counts, **settings)), 10, 30)


def test_a_rewritten_shard_keeps_the_places_of_its_samples() -> None:
    counts = numbered(0, 8)
    now = one_source(counts)
    before = initial_history(now)
    same = CurrentData(4, (CurrentSource("s", 1.0, shards(counts, rewritten=("003.tar",))),), 7, 2)
    history, changes = resume_history(before, same, 3)
    assert [change.text for change in changes] == [
        "data set s: 1 shard (003.tar) rewritten (0 samples more, 0 fewer): each sample is taken for the one that "
        "was in its place"
    ]
    assert steps_of(history, 0, 20) == steps_of(before, 0, 20)
    assert resume_history(history, same, 5) == (history, [])  # said once
    longer = {**counts, "003.tar": 8}
    history, changes = resume_history(before, one_source(longer), 3)
    assert "(4 samples more, 0 fewer)" in changes[0].text
    assert Counter(steps_of(history, 0, 9)) == Counter(everything(longer))


# ---- left-out steps


def test_a_new_run_leaves_out_the_steps_of_the_recipe() -> None:
    now = one_source(numbered(0, 30))
    plain = initial_history(now)
    history = initial_history(replace(now, skip_steps=((2, 3), (6, 8), (9, 9))))
    kept = [step for step in range(20) if step not in (2, 3, 6, 7, 8, 9)]
    timelines = Timeline(history), Timeline(plain)
    for step, original in enumerate(kept):
        assert samples_of(timelines[0], step) == samples_of(timelines[1], original)
    assert timelines[0].consumed(6) == {"s": 4 * (6 + 6)}


def test_ranges_added_later_count_the_steps_of_the_run_as_it_was() -> None:
    now = one_source(numbered(0, 30))
    first, changes = resume_history(initial_history(now), replace(now, skip_steps=((5, 6),)), 4)
    assert [change.text for change in changes] == [
        "data.skip_steps: [5, 6] added: the data of these steps is left out; step 5 has that of step 7 instead"
    ]
    # Step 9 of this run has the data of step 11 of the recipe, and [8, 9] is to leave that out.
    both = replace(now, skip_steps=((5, 6), (8, 9)))
    second, _ = resume_history(first, both, 7)
    plain = Timeline(initial_history(now))
    assert [samples_of(Timeline(first), step) == samples_of(plain, step + 2) for step in (5, 9)] == [
        True,
        True,
    ]
    for step, original in ((4, 4), (5, 7), (7, 9), (8, 12), (9, 13)):
        assert samples_of(Timeline(second), step) == samples_of(plain, original), step
    # Both given before either is reached: the same data is left out in another order of numbers.
    ahead, _ = resume_history(first, both, 4)
    assert steps_of(ahead, 4, 12) == steps_of(second, 4, 12)


def test_ranges_that_come_too_late_or_go() -> None:
    now = one_source(numbered(0, 30))
    plain = initial_history(now)
    history, changes = resume_history(plain, replace(now, skip_steps=((1, 2),)), 4)
    assert [(c.text, c.effect) for c in changes] == [
        ("data.skip_steps: [1, 2] added: no effect, these steps are trained already", False)
    ]
    assert steps_of(history, 0, 20) == steps_of(plain, 0, 20)
    assert resume_history(history, replace(now, skip_steps=((1, 2),)), 9) == (history, [])
    history, changes = resume_history(plain, replace(now, skip_steps=((2, 5),)), 4)
    assert "the data from step 4 on, the next one, is left out; step 4 has that of step 6" in changes[0].text
    assert steps_of(history, 4, 10) == steps_of(plain, 6, 12)
    pending, _ = resume_history(plain, replace(now, skip_steps=((8, 9),)), 4)
    back, changes = resume_history(pending, now, 8)
    assert [change.text for change in changes] == [
        "data.skip_steps: [8, 9] removed: its data is trained on after all"
    ]
    assert steps_of(back, 0, 20) == steps_of(plain, 0, 20)
    kept, changes = resume_history(pending, now, 9)
    assert not changes[0].effect
    assert steps_of(kept, 0, 20) == steps_of(pending, 0, 20)


def test_left_out_steps_with_another_batch_size_and_new_shards() -> None:
    now = one_source(numbered(0, 20))
    pending = initial_history(replace(now, skip_steps=((6, 7),)))
    changed = CurrentData(6, now.sources, 7, 2, ((6, 7),))
    history, _ = resume_history(pending, changed, 4)
    plain = steps_of(initial_history(now), 0, 20)
    assert steps_of(history, 4, 12) == (plain[:24] + plain[32:])[16 : 16 + 48]
    added = CurrentData(6, one_source(numbered(0, 24)).sources, 7, 2, ((6, 7),))
    history, _ = resume_history(pending, added, 4)
    came = steps_of(history, 0, 15)
    assert len(set(came)) == len(came) == 16 + 66


def test_left_out_steps_wait_where_the_mixture_changes() -> None:
    sources = (
        CurrentSource("a", 1.0, shards(numbered(0, 30))),
        CurrentSource("b", 1.0, shards(numbered(0, 30))),
    )
    now = CurrentData(4, sources, 7, 2, ((6, 7),))
    changed = replace(now, sources=(replace(sources[0], weight=3.0), sources[1]))
    history, _ = resume_history(initial_history(now), changed, 4)
    given = [sum(Timeline(history).consumed(step).values()) for step in range(4, 10)]
    assert given == [16, 20, 24, 36, 40, 44]


# ---- many changes


@dataclass
class Model:
    """Which samples may come: those of the shards of now that were not seen in this epoch."""

    seen: dict[str, set[tuple[str, int]]] = field(default_factory=dict)

    def draw(self, now: CurrentData, name: str, sample: tuple[str, int]) -> None:
        seen = self.seen.setdefault(name, set())
        assert sample in self.every(now, name) - seen, (name, sample)
        seen.add(sample)
        self.end_epochs(now)

    def end_epochs(self, now: CurrentData) -> None:
        """An epoch ends with the last sample of what the source has; also where that is because shards went."""
        for source in now.sources:
            if self.every(now, source.name) <= self.seen.get(source.name, set()):
                self.seen[source.name] = set()

    @staticmethod
    def every(now: CurrentData, name: str) -> set[tuple[str, int]]:
        (source,) = [source for source in now.sources if source.name == name]
        listed = zip(source.shards.names, source.shards.counts, strict=True)
        return {(shard, row) for shard, count in listed for row in range(count)}


def random_now(rng: random.Random, now: CurrentData) -> CurrentData:
    """One or two things changed."""
    sources = list(now.sources)
    for _ in range(rng.randint(1, 2)):
        kind = rng.choice(["batch", "weight", "add", "remove", "rewrite", "window", "seed", "drop", "source"])
        at = rng.randrange(len(sources))
        counts = dict(zip(sources[at].shards.names, sources[at].shards.counts, strict=True))
        if kind == "batch":
            now = replace(now, samples_per_step=rng.randint(1, 12))
        elif kind == "window":
            now = replace(now, window=rng.randint(1, 5))
        elif kind == "seed":
            now = replace(now, seed=rng.randint(0, 99))
        elif kind == "weight":
            sources[at] = replace(sources[at], weight=rng.choice([0.5, 1.0, 3.0]))
        elif kind == "drop" and len(sources) > 1:
            del sources[at]
        elif kind == "source":
            free = [name for name in "abc" if name not in {source.name for source in sources}]
            for name in free[:1]:
                sources.insert(0, CurrentSource(name, 1.0, shards(numbered(0, rng.randint(1, 6), 3))))
        elif kind == "add":
            free = [f"{n:03d}.tar" for n in range(12) if f"{n:03d}.tar" not in counts]
            counts |= {
                name: rng.randint(0, 5) for name in rng.sample(free, min(len(free), rng.randint(1, 3)))
            }
        elif kind == "remove" and len(counts) > 2:
            for name in rng.sample(sorted(counts), rng.randint(1, len(counts) - 1)):
                del counts[name]
        elif kind == "rewrite":
            counts[rng.choice(sorted(counts))] = rng.randint(1, 6)
        if kind in ("add", "remove", "rewrite") and sum(counts.values()):
            sources[at] = replace(sources[at], shards=shards(counts))
    return replace(now, sources=tuple(sources))


@pytest.mark.parametrize("seed", range(30))
def test_any_succession_of_changes_shows_no_sample_twice_and_loses_none(seed: int) -> None:
    rng = random.Random(seed)
    now = CurrentData(
        rng.randint(1, 9),
        tuple(CurrentSource(name, 1.0, shards(numbered(0, rng.randint(1, 8), 3))) for name in "ab"),
        1,
        rng.randint(1, 4),
    )
    history, model, step, came = initial_history(now), Model(), 0, []
    for _ in range(8):
        timeline = Timeline(history)
        for _ in range(rng.choice([0, 1, 2, 7])):
            drawn = samples_of(timeline, step)
            assert len(drawn) == now.samples_per_step
            for name, *sample in drawn:
                model.draw(now, name, (sample[0], sample[1]))
            came.append(drawn)
            step += 1
        now = random_now(rng, now)
        model.end_epochs(now)
        saved = decode_history(encode_history(history, step), "here")
        assert saved == history
        history, _ = resume_history(saved, now, step)
        assert resume_history(saved, now, step)[0] == history  # again after a kill before the first save
        assert resume_history(history, now, step)[1] == []
    later = Timeline(history)
    assert [samples_of(later, number) for number in range(step)] == came  # what has been stays as it was
    consumed = Counter(name for drawn in came for name, _, _ in drawn)
    assert {name: count for name, count in later.consumed(step).items() if count} == consumed


def test_a_large_source_changes_quickly_and_its_record_stays_small() -> None:
    """30,000 shards of 10,000 samples: what is remembered grows with the shards, not with the samples."""
    counts = {f"{number:06d}.tar": 10_000 for number in range(30_000)}
    history = initial_history(one_source(counts, batch=30_720, window=8))
    for number in range(3):
        counts[f"new{number}.tar"] = 10_000
        history, _ = resume_history(history, one_source(counts, batch=30_720, window=8), 4_000 + 100 * number)
    editions = Timeline(history).editions["s"]
    assert sum(len(rows) for rows in editions.epoch(3, 0).rows.values()) < 8 * 3 * 10_000
    assert editions.epoch(3, 0).places == 30_003 * 10_000 - 4_200 * 30_720
    assert len(encode_history(history, 5_000)) < 4 * 2_000_000


# ---- the record


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"format": 1}', b'{"format": 1, "segments": [{}], "editions": {}}']
)
def test_what_is_no_record_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^here: not the record of a run's data"):
        decode_history(content, "here")
    with pytest.raises(DataError, match="here: expected format 1, found 2"):
        decode_history(b'{"format": 2}', "here")


def test_an_edition_within_an_edition_of_the_same_epoch() -> None:
    """Shards that go and come back within an epoch: what was seen of them does not come again."""
    listed = shards(numbered(0, 6))
    less = shards(numbered(0, 3))
    editions = Editions(
        "s", [Edition(listed, 1, 1), Edition(less, 1, 1, 0, taken=10), Edition(listed, 1, 1, 0, taken=2)]
    )
    came = [sample_at(editions, 0, position) for position in range(10)]
    came += [sample_at(editions, 1, position) for position in range(2)]
    came += [sample_at(editions, 2, position) for position in range(12)]
    assert Counter(came) == Counter((name, row) for name in listed.names for row in range(4))
