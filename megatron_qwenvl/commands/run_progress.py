"""Show the progress of a training run from its directory: step, loss, rate, newest checkpoint, time left.

    python tools/run_progress.py runs/stage1
    python tools/run_progress.py runs/stage1 --finished  # prints nothing; exit code 0 if its last step is saved, else 1

Needs only Python's standard library, so that it runs on a login node.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_qwenvl.runtime.exit_codes import RUN_ERROR, SUCCESS
from megatron_qwenvl.runtime.listing import matching_entries

TAIL_BYTES = 200_000
"""Bytes of the metrics that are read, from the end."""
RECENT_RECORDS = 20
"""Steps from which the rate and the time left are computed."""


def total_steps(run: Path) -> int | None:
    """Read the number of steps from the resolved configuration; None before the run has started or where it is lost."""
    try:
        steps = json.loads((run / "config.json").read_text(encoding="utf-8"))["train"]["steps"]
        if isinstance(steps, int):
            return steps
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return _steps_of_yaml(run / "config.yaml")


def _steps_of_yaml(path: Path) -> int | None:
    """Read it from config.yaml: earlier versions wrote no config.json."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    train = re.search(r"^train:\n((?: .*\n)+)", text, re.MULTILINE)
    steps = re.search(r"^  steps: (\d+)$", train.group(1), re.MULTILINE) if train else None
    return int(steps.group(1)) if steps else None


def saved_step(run: Path) -> int | None:
    """Find the step of the newest complete checkpoint."""
    folder = run / "checkpoints"
    complete = [path for path in matching_entries(folder, "step_*") if (path / "manifest.json").exists()]
    steps = [path.name.removeprefix("step_") for path in complete]
    return max((int(step) for step in steps if step.isdigit()), default=None)


def recent_records(run: Path) -> list[dict[str, Any]]:
    """Read the last records of training steps, oldest first."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the first line is cut, the last may be half written
            continue
        if not isinstance(record, dict):
            continue
        if record.get("kind") == "rewind":  # the run went back to an older checkpoint on request
            records.clear()
        elif record.get("kind") == "train":
            if records and record["step"] <= records[-1]["step"]:  # resumed from an older checkpoint
                records.clear()
            records.append(record)
    return records[-RECENT_RECORDS:]


def describe_run(run: Path) -> str:
    """Describe the progress in one line."""
    steps, records, saved = total_steps(run), recent_records(run), saved_step(run)
    if steps is None and not records and saved is None:
        return "not started"
    parts = [f"step {records[-1]['step'] + 1 if records else saved or 0}/{steps or '?'}"]
    if records:
        last = records[-1]
        if last.get("loss") is not None:
            parts.append(f"loss {last['loss']:.4f}")
        parts.append(f"{last['samples_per_second']:.1f} samples/s")
    parts.append("nothing saved" if saved is None else f"saved step {saved}")
    if steps is None:
        parts.append("config.json and config.yaml are missing or damaged; the next start writes them")
    elif (seconds := seconds_left(records, steps)) is not None and saved != steps:
        parts.append(f"{format_time(seconds)} left")
    return " | ".join(parts)


def seconds_left(records: list[dict[str, Any]], steps: int) -> float | None:
    """Estimate the seconds to the last step from the recent rate, with saves and validations; None without a rate."""
    if len(records) < 2 or records[-1]["step"] <= records[0]["step"]:
        return None
    rate = (records[-1]["time"] - records[0]["time"]) / (records[-1]["step"] - records[0]["step"])
    return float(rate * (steps - 1 - records[-1]["step"]))


def format_time(seconds: float) -> str:
    """Format a duration as `3d 04h`, `2h 05m` or `1m 10s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the progress, or answer by exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--finished", action="store_true", help="answer by exit code")
    arguments = parser.parse_args(argv)
    if arguments.finished:
        steps = total_steps(arguments.run)
        return SUCCESS if steps is not None and saved_step(arguments.run) == steps else RUN_ERROR
    print(describe_run(arguments.run))
    return SUCCESS


def run() -> NoReturn:
    """Run the program and exit with its code."""
    sys.exit(main())


if __name__ == "__main__":
    run()
