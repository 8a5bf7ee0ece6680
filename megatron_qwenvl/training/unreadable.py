"""Sliding window over the newest samples: the number of unreadable ones, and their shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from megatron_qwenvl.batch import Batch

RecentUnreadable = tuple[tuple[int, int], ...]
"""(samples of the run up to the end of the step, unreadable ones) of each step with any, within the window."""

UnreadableSample = tuple[int, str, str]
"""Unreadable sample: samples of the run up to the end of its step, its shard and its key."""

WORST_SHARDS = 5
"""Shards that a message names."""


def slide_window(
    recent: RecentUnreadable, seen: int, samples: int, unreadable: int, window: int
) -> RecentUnreadable:
    """Move the window by one step, and drop the steps that no longer lie within it.

    Args:
        recent: the window before the step.
        seen: samples of the run up to the end of this step.
        samples: samples of this step.
        unreadable: unreadable samples of this step.
        window: length of the window in samples.
    """
    kept = tuple(entry for entry in recent if entry[0] - samples >= seen - window)
    return (*kept, (seen, unreadable)) if unreadable else kept


def exceeds_share(recent: RecentUnreadable, batch: int, window: int, share: float) -> bool:
    """Return whether more than `share` of the window could not be read.

    A window that is not full yet counts as full, so that a few bad samples at the start do not end the run.

    Args:
        recent: the window.
        batch: samples of the newest step; the window holds at least these.
        window: length of the window in samples.
        share: allowed share.
    """
    return sum(count for _, count in recent) > share * max(window, batch)


class UnreadableShards:
    """Unreadable samples of this rank within the window; not saved in checkpoints."""

    def __init__(self) -> None:
        self.found: list[UnreadableSample] = []
        """Unreadable samples within the window."""

    def add(self, recent: RecentUnreadable, seen: int, batches: Iterable[Batch]) -> None:
        """Add the unreadable samples of the step that ended at `seen`; `recent` is the window after it."""
        oldest = recent[0][0] if recent else seen + 1
        found = ((seen, *name) for batch in batches for name in batch.bad_names)
        self.found = [entry for entry in (*self.found, *found) if entry[0] >= oldest]


def worst_shards(of_ranks: Iterable[Iterable[UnreadableSample]]) -> str:
    """List the shards with the most unreadable samples and their number; samples read by several ranks count once."""
    samples = {entry for found in of_ranks for entry in found}
    counts = Counter(shard for _, shard, _ in samples)
    worst = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{shard} ({count})" for shard, count in worst[:WORST_SHARDS])
    return shown + (f" and {len(worst) - WORST_SHARDS} more" if len(worst) > WORST_SHARDS else "")
