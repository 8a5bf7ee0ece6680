"""Changes of a run's data since a checkpoint, and the history that follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .epochs import Edition, Editions, ShardList
from .history import DataHistory, Segment, SkippedRange, SourceState, StepRange, Timeline
from .mixture import quotas_of

NAMED = 3
"""Number of shards that a message names; of more it gives the number."""


@dataclass(frozen=True)
class CurrentSource:
    """A source of the mixture as it is today."""

    name: str
    weight: float
    shards: ShardList


@dataclass(frozen=True)
class CurrentData:
    """Everything that the order of samples depends on, as a run is started with it."""

    samples_per_step: int
    sources: tuple[CurrentSource, ...]
    seed: int
    window: int
    skip_steps: tuple[StepRange, ...] = ()


@dataclass(frozen=True)
class DataChange:
    """A change of the data, and its consequence.

    Attributes:
        text: both in one line.
        effect: whether any later step differs.
    """

    text: str
    effect: bool = True


def initial_history(now: CurrentData) -> DataHistory:
    """Make the history of a run that has no checkpoint."""
    sources = tuple(SourceState(source.name, source.weight, 0, 0) for source in now.sources)
    segment = Segment(0, now.samples_per_step, 0, sources)
    ranges = tuple(_skipped_range(segment, steps, 0) for steps in now.skip_steps)
    editions = {source.name: (Edition(source.shards, now.seed, now.window),) for source in now.sources}
    return DataHistory((replace(segment, skipped_ranges=ranges),), editions, now.skip_steps)


def resume_history(history: DataHistory, now: CurrentData, step: int) -> tuple[DataHistory, list[DataChange]]:
    """Continue the history of a run that resumes from a checkpoint.

    Args:
        history: that of the checkpoint.
        now: the data of today.
        step: number of steps done.

    Returns:
        The history and the changes; the same history where nothing has changed.
    """
    timeline = Timeline(history)
    before = timeline.segment(step)
    editions, sources, changes = _sources(timeline, before, now, step)
    same_mixture = [s.name for s in sources] == [s.name for s in before.sources] and (
        quotas_of([s.weight for s in sources]) == quotas_of(before.weights)
    )
    if same_mixture:  # also where all weights are multiples of what they were
        sources = [replace(s, weight=weight) for s, weight in zip(sources, before.weights, strict=True)]
    else:
        changes.append(DataChange(_mixture_text(before, sources, step)))
    if now.samples_per_step != before.samples_per_step:
        changes.append(DataChange(_batch_text(before, now, sum(timeline.consumed(step).values()), step)))
    ranges, skip_changes = _current_skipped_ranges(history, before, now, step)
    stream = before.reached(step) if same_mixture else 0
    segment = Segment(
        step,
        now.samples_per_step,
        stream,
        tuple(sources),
        tuple(_moved(some, stream - before.reached(step)) for some in ranges),
    )
    changes += skip_changes
    segments = history.segments
    if any(change.effect for change in changes):
        segments = (*segments, segment)
    return DataHistory(segments, editions, now.skip_steps), changes


def _sources(
    timeline: Timeline, before: Segment, now: CurrentData, step: int
) -> tuple[dict[str, tuple[Edition, ...]], list[SourceState], list[DataChange]]:
    """Return all editions, the states of today's sources at the step, and the changes in them."""
    states, consumed = timeline.states(step), timeline.consumed(step)
    editions = dict(timeline.history.editions)
    sources: list[SourceState] = []
    changes = list(_order_changes(editions, now, step))
    current = [source.name for source in before.sources]
    for source in _in_order(now.sources, current):
        state = states.get(source.name)
        start = f"data set {source.name}:"
        if state is None:
            editions[source.name] = (Edition(source.shards, now.seed, now.window),)
            sources.append(SourceState(source.name, source.weight, 0, 0))
            samples = f"{source.shards.total} samples"
            changes.append(DataChange(f"{start} new ({samples}): its first epoch begins at step {step}"))
            continue
        if source.name not in current:
            gave = consumed[source.name]
            changes.append(
                DataChange(f"{start} back: from step {step} on it goes on after the {gave} samples given")
            )
        source_editions = timeline.editions[source.name]
        epoch, taken = source_editions.place(state.edition, state.position)
        last = editions[source.name][-1]
        following = Edition(source.shards, now.seed, now.window, epoch, taken)
        changes += [
            DataChange(f"{start} {text}") for text in _shard_changes(source.name, editions, following, step)
        ]
        if _same_order(last, following):
            following = replace(last, shards=source.shards)  # digests of today
            editions[source.name] = (*editions[source.name][:-1], following)
        else:
            editions[source.name] = (*editions[source.name], following)
            state = replace(state, edition=state.edition + 1, position=0)
        sources.append(replace(state, weight=source.weight))
    for name in current:
        if name not in {source.name for source in now.sources}:
            text = f"dropped: it ends at step {step} after {consumed[name]} samples, and goes on there if it comes back"
            changes.append(DataChange(f"data set {name}: {text}"))
    return editions, sources, changes


def _in_order(sources: Sequence[CurrentSource], names: Sequence[str]) -> list[CurrentSource]:
    """Sort known sources as they stood before, then the others: their order in the configuration has no meaning."""
    return sorted(sources, key=lambda s: names.index(s.name) if s.name in names else len(names))


def _same_order(edition: Edition, other: Edition) -> bool:
    return (edition.seed, edition.window, edition.shards.names, edition.shards.counts) == (
        other.seed,
        other.window,
        other.shards.names,
        other.shards.counts,
    )


def _order_changes(
    editions: dict[str, tuple[Edition, ...]], now: CurrentData, step: int
) -> Iterator[DataChange]:
    known = [editions[source.name][-1] for source in now.sources if source.name in editions]
    for field, value, was in (
        ("seed", now.seed, sorted({edition.seed for edition in known} - {now.seed})),
        ("data.shuffle_window", now.window, sorted({edition.window for edition in known} - {now.window})),
    ):
        if was:
            yield DataChange(
                f"{field}: was {', '.join(map(str, was))}, now {value}: from step {step} on the unseen samples of each "
                "source's epoch come in another order"
            )


def _shard_changes(
    name: str, editions: dict[str, tuple[Edition, ...]], following: Edition, step: int
) -> Iterator[str]:
    """Describe shards added, removed and rewritten, one line each."""
    before, after = editions[name][-1].shards, following.shards
    if before == after:
        return
    old = dict(zip(before.names, zip(before.counts, before.digests, strict=True), strict=True))
    new = dict(zip(after.names, zip(after.counts, after.digests, strict=True), strict=True))
    if added := [shard for shard in after.names if shard not in old]:
        samples = sum(new[shard][0] for shard in added)
        yield f"{_shards(added)} added ({samples} samples): part of this epoch from step {step} on"
    if removed := [shard for shard in before.names if shard not in new]:
        samples = sum(old[shard][0] for shard in removed)
        kept = replace(following, shards=before)
        unseen = Editions(name, [*editions[name], kept]).unseen(len(editions[name]))
        lost = sum(int(n) for shard, n in zip(before.names, unseen, strict=True) if shard not in new)
        yield (
            f"{_shards(removed)} removed ({samples} samples, {lost} of them not seen in this epoch): "
            f"no part of it from step {step} on"
        )
    if rewritten := [shard for shard in after.names if shard in old and old[shard] != new[shard]]:
        more = sum(max(0, new[shard][0] - old[shard][0]) for shard in rewritten)
        fewer = sum(max(0, old[shard][0] - new[shard][0]) for shard in rewritten)
        yield (
            f"{_shards(rewritten)} rewritten ({more} samples more, {fewer} fewer): each sample is taken for the one "
            "that was in its place"
        )


def _shards(names: Sequence[str]) -> str:
    named = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{len(names)} {'shard' if len(names) == 1 else 'shards'} ({named})"


def _mixture_text(before: Segment, sources: Sequence[SourceState], step: int) -> str:
    return (
        f"data mixture: was {_shares(before.sources)}, now {_shares(sources)} from step {step} on; every source "
        "goes on in its own order of samples after those that it has given"
    )


def _shares(sources: Sequence[SourceState]) -> str:
    total = sum(source.weight for source in sources)
    return ", ".join(f"{source.name} {source.weight / total:.2%}" for source in sources)


def _batch_text(before: Segment, now: CurrentData, consumed: int, step: int) -> str:
    return (
        f"data.global_batch_size: was {before.samples_per_step}, now {now.samples_per_step} from step {step} on; "
        f"{consumed} samples were consumed, and the next step goes on after them"
    )


def _current_skipped_ranges(
    history: DataHistory, before: Segment, now: CurrentData, step: int
) -> tuple[list[SkippedRange], list[DataChange]]:
    """Return the ranges to skip from the step on, in the stream of the segment before, and the changes in them."""
    pending = [left for some in before.skipped_ranges if (left := _from(some, before.reached(step))).ranges]
    changes, kept = [], [some for some in pending if some.steps in now.skip_steps]
    for steps in now.skip_steps:
        if steps in history.skip_steps:
            continue
        text = f"data.skip_steps: [{steps[0]}, {steps[1]}] added:"
        if steps[1] < step:
            changes.append(DataChange(f"{text} no effect, these steps are trained already", effect=False))
            continue
        kept.append(_skipped_range(before, steps, step))
        first = max(steps[0], step)
        which = (
            "the data of these steps"
            if first == steps[0]
            else f"the data from step {first} on, the next one,"
        )
        changes.append(
            DataChange(f"{text} {which} is left out; step {first} has that of step {steps[1] + 1} instead")
        )
    for steps in history.skip_steps:
        if steps in now.skip_steps:
            continue
        text = f"data.skip_steps: [{steps[0]}, {steps[1]}] removed:"
        if any(some.steps == steps for some in pending):
            changes.append(DataChange(f"{text} its data is trained on after all"))
        else:
            changes.append(DataChange(f"{text} no effect, the run is past it", effect=False))
    return kept, changes


def _skipped_range(segment: Segment, steps: StepRange, done: int) -> SkippedRange:
    """Return the data of the steps that are not done yet, in the positions of the segment."""
    first = max(steps[0], done)
    return SkippedRange(steps, tuple(segment.ranges(first, steps[1] - first + 1)))


def _from(skipped: SkippedRange, position: int) -> SkippedRange:
    return replace(skipped, ranges=tuple(some for some in skipped.ranges if some[0] >= position))


def _moved(skipped: SkippedRange, by: int) -> SkippedRange:
    return replace(skipped, ranges=tuple((first + by, count) for first, count in skipped.ranges))
