"""Train a tiny model through the three stages on this machine and question it about held-out images.

    python tools/demo.py [--tensor 2] [--pipeline 2] [--out runs/demo] [--data data/demo]

Writes the data set, trains stages 1, 2 and 3 with conversions between them, as tensor x pipeline processes over gloo,
and questions the model. OUT/report.html shows images with questions and answers, loss curves and scores; scores and
seconds are in OUT/report.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_qwenvl.config.options import OptionParser
from megatron_qwenvl.demo.training import STAGES, DemoRun, make_data, train_stage
from megatron_qwenvl.runtime.exit_codes import RUN_ERROR, SUCCESS

from .entry import run_program

VQA_GOAL = 0.90


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 1 if a step fails or the model did not learn to use the images."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, default=2, help="tensor-parallel size")
    parser.add_argument("--pipeline", type=int, default=2, help="pipeline-parallel size")
    parser.add_argument("--data_parallel", type=int, default=1, help="data-parallel size")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="replaced if it exists")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="replaced if it exists")
    parser.add_argument("--seed", type=int, default=1234, help="seed of data and weights")
    arguments = parser.parse_args(argv)
    demo = DemoRun(**vars(arguments))
    began = time.monotonic()
    for folder in (demo.out, demo.data):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        make_data(demo)
        for number, stage in enumerate(STAGES):
            train_stage(demo, stage, previous=STAGES[number - 1] if number else None)
    except subprocess.CalledProcessError as error:
        print(f"demo: {name_program(error.cmd)} failed with exit code {error.returncode}", file=sys.stderr)
        return RUN_ERROR
    from megatron_qwenvl.demo.questioning import question_model

    report = question_model(demo)
    report["seconds"] = round(time.monotonic() - began, 1)
    (demo.out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return print_result(report, demo.out)


def print_result(report: dict[str, Any], out: Path) -> int:
    """Print the scores and the path of the report; returns the exit code."""
    learned = report["vqa_accuracy"] >= VQA_GOAL
    print(
        f"\nAfter {report['seconds']:.0f} s. To look at: {out / 'report.html'} (scores: {out / 'report.json'})"
    )
    print(
        f"The model {'learned' if learned else 'DID NOT learn'} to see: {report['vqa_accuracy']:.0%} of the "
        f"answers are right, {report['vqa_accuracy_shuffled_images']:.0%} with exchanged images "
        f"(chance is {report['vqa_chance']:.0%})."
    )
    return SUCCESS if learned else RUN_ERROR


def name_program(command: Sequence[str]) -> str:
    """Name a failed command by its module and arguments, without the interpreter and the launcher."""
    start = len(command) - list(reversed(command)).index("-m")
    return " ".join(command[start:])


def run() -> NoReturn:
    """Run the program and exit with its code."""
    run_program("demo", main)


if __name__ == "__main__":
    run()
