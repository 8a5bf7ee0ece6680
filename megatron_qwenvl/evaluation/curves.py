"""The loss curves of a run, from its metrics file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .charts import Line
from .report import Chart


def loss_chart(run: Path, title: str) -> Chart:
    """Training and validation loss of a run over its steps.

    A step that was trained twice, after a run went back to an older checkpoint, counts as it was trained last.

    Args:
        run: a run directory; without metrics the chart is empty.
        title: heading of the chart.
    """
    training: dict[int, float] = {}
    validation: dict[int, float] = {}
    for record in _records(run / "metrics.jsonl"):
        if (
            record.get("kind") == "rewind"
        ):  # what came after the step that the run went back to is not of this run
            training = {step: loss for step, loss in training.items() if step <= record["step"]}
            validation = {step: loss for step, loss in validation.items() if step <= record["step"]}
        loss = record.get("loss")
        value = float(loss) if isinstance(loss, int | float) else math.nan
        if record.get("kind") == "train":
            training[int(record["step"]) + 1] = value  # counted from 0 there, and from 1 on the screen
        elif record.get("kind") == "validation":
            validation[int(record["step"])] = value
    lines = [Line("training", sorted(training.items())), Line("validation", sorted(validation.items()), True)]
    return Chart(title, [line for line in lines if line.points])


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of the file; a line that a crash tore is passed over."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
