"""How many of the newest samples could not be read, and in which shards they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from megatron_qwenvl.batch import Batch

Recent = tuple[tuple[int, int], ...]
"""For each step with unreadable samples within the window: samples seen up to its end, and the unreadable ones."""

Found = tuple[int, str, str]
"""A sample that a rank could not read: samples seen up to the end of its step, its shard and its key."""

WORST_SHARDS = 5
"""Shards that a message names."""


def slide(recent: Recent, seen: int, samples: int, unreadable: int, window: int) -> Recent:
    """The window after one more step: its own samples, and earlier steps that lie within `window` samples with it.

    Args:
        recent: the window before.
        seen: samples of the run up to the end of this step.
        samples: samples of this step.
        unreadable: those that could not be read.
        window: samples.
    """
    kept = tuple(entry for entry in recent if entry[0] - samples >= seen - window)
    return (*kept, (seen, unreadable)) if unreadable else kept


def too_many(recent: Recent, batch: int, window: int, share: float) -> bool:
    """Return whether more than `share` of the window could not be read.

    A window that is not full yet counts as a full one, so that a few bad samples at the start of a run are no verdict.

    Args:
        recent: the window.
        batch: samples of the newest step; the window holds at least these.
        window: samples.
        share: allowed share.
    """
    return sum(count for _, count in recent) > share * max(window, batch)


class UnreadableShards:
    """Remembers which of the newest samples this rank could not read. A run that is started again begins anew."""

    def __init__(self) -> None:
        self.found: list[Found] = []
        """Those within the window."""

    def add(self, recent: Recent, seen: int, batches: Iterable[Batch]) -> None:
        """Note the unreadable samples of the step that ended at `seen`; `recent` is the window after it."""
        oldest = recent[0][0] if recent else seen + 1
        found = ((seen, *name) for batch in batches for name in batch.bad_names)
        self.found = [entry for entry in (*self.found, *found) if entry[0] >= oldest]


def worst_shards(of_ranks: Iterable[Iterable[Found]]) -> str:
    """The shards with the most unreadable samples, each with their number; a sample that several ranks read counts
    once."""
    samples = {entry for found in of_ranks for entry in found}
    counts = Counter(shard for _, shard, _ in samples)
    worst = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{shard} ({count})" for shard, count in worst[:WORST_SHARDS])
    return shown + (f" and {len(worst) - WORST_SHARDS} more" if len(worst) > WORST_SHARDS else "")
