"""How far a run has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .step import StepReport


@dataclass
class Progress:
    """Counters of a run; saved with every checkpoint."""

    step: int = 0
    """Steps done, skipped ones included."""
    samples: int = 0
    """Samples seen."""
    skipped_steps: int = 0
    """Steps without an update because the loss or the gradient was not finite."""
    skipped_in_a_row: int = 0
    """The same, since the last update."""
    unreadable_samples: int = 0
    """Samples whose loss was masked because they could not be read."""

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Progress:
        """The counters of a checkpoint; what it holds beside them is left out."""
        return cls(**{name: saved[name] for name in cls.__dataclass_fields__ if name in saved})

    @property
    def updates(self) -> int:
        """Optimizer updates made."""
        return self.step - self.skipped_steps

    def after(self, report: StepReport) -> Progress:
        """Counters after one more step."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + report.samples,
            skipped_steps=self.skipped_steps + (not report.applied),
            skipped_in_a_row=0 if report.applied else self.skipped_in_a_row + 1,
            unreadable_samples=self.unreadable_samples + report.skipped_samples,
        )
