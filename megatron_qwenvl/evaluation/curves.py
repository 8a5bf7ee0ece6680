"""Loss curves of a run, from its metrics file."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_qwenvl.runtime.json_lines import read_records

from .charts import Curve
from .report import Chart


def loss_chart(run: Path, title: str) -> Chart:
    """Make the chart of training and validation loss of a run over its steps.

    The last record counts for a step that was trained again after the run went back to an older checkpoint.

    Args:
        run: a run directory; without metrics the chart is empty.
        title: heading of the chart.
    """
    training: dict[int, float] = {}
    validation: dict[int, float] = {}
    metrics = run / "metrics.jsonl"
    for record in read_records(metrics) if metrics.is_file() else ():
        if record.get("kind") == "rewind":  # what came after the step that it went back to is not of this run
            training = {step: loss for step, loss in training.items() if step <= record["step"]}
            validation = {step: loss for step, loss in validation.items() if step <= record["step"]}
        loss = record.get("loss")
        value = float(loss) if isinstance(loss, int | float) else math.nan
        if record.get("kind") == "train":
            training[int(record["step"]) + 1] = value  # counted from 0 there, and from 1 on the screen
        elif record.get("kind") == "validation":
            validation[int(record["step"])] = value
    lines = [
        Curve("training", sorted(training.items())),
        Curve("validation", sorted(validation.items()), True),
    ]
    return Chart(title, [line for line in lines if line.points])
