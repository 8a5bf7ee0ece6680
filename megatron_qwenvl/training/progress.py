"""Progress of a run: its counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .step import StepReport
from .unreadable import RecentUnreadable, slide_window


@dataclass
class Progress:
    """Counters of a run; saved with every checkpoint."""

    step: int = 0
    """Completed steps, skipped ones included."""
    samples: int = 0
    """Samples of these steps."""
    skipped_steps: int = 0
    """Steps without an update: loss or gradient not finite, or no supervised token."""
    skipped_in_a_row: int = 0
    """Consecutive steps without an update, since the last update."""
    unreadable_samples: int = 0
    """Samples whose loss was masked because they could not be read."""
    recent_unreadable: RecentUnreadable = ()
    """Unreadable samples among the newest `data.unreadable_window` samples."""

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Progress:
        """Read the counters of a checkpoint; unknown entries are ignored."""
        known = {name: saved[name] for name in cls.__dataclass_fields__ if name in saved}
        recent = tuple((seen, count) for seen, count in saved.get("recent_unreadable", ()))
        return cls(**{**known, "recent_unreadable": recent})

    @property
    def updates(self) -> int:
        """Optimizer updates made."""
        return self.step - self.skipped_steps

    def after(self, report: StepReport, window: int) -> Progress:
        """Return the counters after one more step; `window` is `data.unreadable_window`."""
        seen = self.samples + report.samples
        return replace(
            self,
            step=self.step + 1,
            samples=seen,
            skipped_steps=self.skipped_steps + (not report.applied),
            skipped_in_a_row=0 if report.applied else self.skipped_in_a_row + 1,
            unreadable_samples=self.unreadable_samples + report.skipped_samples,
            recent_unreadable=slide_window(
                self.recent_unreadable, seen, report.samples, report.skipped_samples, window
            ),
        )
