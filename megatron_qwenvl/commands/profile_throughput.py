"""Step time, samples/s, tokens/s, TFLOP/s, memory and data wait of a recipe in several layouts, on real shards.

    NPROC=8 python tools/profile_throughput.py --recipe stage2 --data.root /data/qwenvl --out runs/throughput \\
        --layout 'tensor=2 pipeline=2 sequence_parallel=true' \\
        --layout 'tensor=1 pipeline=4 train.recompute=full data.pack_length=4096'

Every layout is `field=value` of `parallel`, or `section.field=value` of any section, separated by spaces; without
`--layout` the recipe is measured unchanged. `--section.field value` applies to all layouts. Each layout is trained for
a few steps from fresh weights (or from `--checkpoint.init_from`) in its own folder below OUT, which holds its log; no
checkpoint is saved. OUT/throughput.json and OUT/throughput.md are rewritten after every layout. All layouts are
validated before the first one starts; a failed one has a row with the reason.
Exit codes: 0 a layout was measured; 1 none was; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_qwenvl.config.options import OptionParser
from megatron_qwenvl.profiling.layouts import (
    Launcher,
    Layout,
    Measurement,
    ProfileError,
    run_layout,
    validate_layouts,
)
from megatron_qwenvl.profiling.throughput import Row, read_metrics, render_markdown, write_table
from megatron_qwenvl.runtime.environment import git_state
from megatron_qwenvl.runtime.exit_codes import RUN_ERROR, SUCCESS, USAGE_ERROR

from .entry import run_program

ROOT = Path(__file__).resolve().parents[2]
STOP_SECONDS = 20.0
"""Time for the launcher to end its processes after a stop signal."""


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; returns the options and the configuration overrides."""
    parser = OptionParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", required=True, help="name of a recipe, or a YAML file")
    parser.add_argument("--out", type=Path, required=True, help="directory for the table and the runs")
    parser.add_argument("--layout", action="append", metavar="'FIELD=VALUE ...'", help="a layout; repeat")
    parser.add_argument("--steps", type=int, default=10, help="steps to measure (default 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument(
        "--launcher",
        type=Path,
        metavar="SCRIPT",
        help="such as launch/srun.sh; left out: torchrun on this machine",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="default: NPROC, or the allocation's tasks below Slurm"
    )
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.steps < 1 or arguments.warmup < 0:
        parser.error("expected --steps 1 or more and --warmup 0 or more")
    return arguments, overrides


def default_launcher() -> Path | None:
    """Path of `launch/local.sh` in a checkout; None if the package is installed without it."""
    script = ROOT / "launch/local.sh"
    return script if script.is_file() else None


def revision() -> str | None:
    """Commit of the checkout, with `-dirty` if it has changes; None outside of a checkout."""
    commit, dirty = git_state(ROOT)
    return commit and commit[:12] + ("-dirty" if dirty else "")


def describe_measurement(measurement: Measurement, rows: list[Row]) -> dict[str, Any]:
    """Describe recipe, hardware and versions for the table; devices and versions are those of the runs' metrics."""
    measured = next((row for row in rows if row.result is not None), None)
    start = read_metrics(Path(measured.folder) / "metrics.jsonl")[0] if measured is not None else {}
    versions = ("python", "torch", "megatron_core", "kernels", "transformer_engine")
    return {
        "recipe": measurement.recipe,
        "overrides": " ".join(measurement.overrides),
        "hardware": f"{start['processes']} x {start['device']}" if start else None,
        "peak_flops_per_device": start.get("peak_flops_per_device"),
        "versions": {name: start[name] for name in versions if start.get(name)},
        "revision": revision(),
        "launcher": measurement.launcher.name,
        "processes": measurement.launcher.processes,
        "warmup_steps": measurement.warmup,
        "measured_steps": measurement.steps,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all layouts; returns the exit code."""
    arguments, overrides = parse_arguments(argv)
    try:
        measurement = Measurement(
            recipe=arguments.recipe,
            launcher=Launcher.find(arguments.launcher or default_launcher(), arguments.processes, os.environ),
            out=arguments.out.resolve(),
            overrides=tuple(overrides),
            steps=arguments.steps,
            warmup=arguments.warmup,
        )
        layouts = [Layout.parse(text) for text in arguments.layout or [""]]
        validate_layouts(measurement, layouts)
    except ProfileError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    measurement.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for number, layout in enumerate(layouts):
        print(f"[{number + 1}/{len(layouts)}] {layout.text}", flush=True)
        row = run_layout(measurement, layouts, number, lambda line: print(line, flush=True))
        if row.reason is not None:
            print(f"  failed: {row.reason} (see {row.folder}/log.txt)", flush=True)
        rows.append(row)
        write_table(measurement.out, describe_measurement(measurement, rows), rows)
    print(render_markdown(describe_measurement(measurement, rows), rows))
    return SUCCESS if any(row.result is not None for row in rows) else RUN_ERROR


def run() -> NoReturn:
    """Run the program and exit with its code."""
    run_program("profile_throughput", main, STOP_SECONDS)


if __name__ == "__main__":
    run()
