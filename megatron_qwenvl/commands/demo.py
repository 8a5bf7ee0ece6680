"""Train a tiny model through the three stages on this machine and question it about held-out images.

    python tools/demo.py [--tensor 2] [--pipeline 2] [--out runs/demo] [--data data/demo]

Writes the data set, trains stage 1, converts, trains stage 2, converts, trains stage 3 as tensor x pipeline
processes over gloo, then asks. OUT/report.html shows images with questions and answers, loss curves and scores;
scores and seconds are in OUT/report.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_qwenvl.runtime.exit_codes import RUN_ERROR, SUCCESS
from megatron_qwenvl.runtime.listing import entries_below
from megatron_qwenvl.runtime.torchrun import local_command

from .entry import run_program

if TYPE_CHECKING:
    from megatron_qwenvl.evaluation.report import Example

STAGES = ("stage1", "stage2", "stage3")
VQA_GOAL = 0.90
EXAMPLES = 12
"""Questions of each task that are shown with their answers."""
SECTIONS = {
    "vqa": "Questions about the image",
    "referring": "Where is it?",
    "ocr_vqa": "Digits in the image",
    "caption": "Captions",
}
"""Tasks of the held-out questions, in the order of the page."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 1 if a part of it fails or the model did not learn to see."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensor", type=int, default=2, help="tensor-parallel size")
    parser.add_argument("--pipeline", type=int, default=2, help="pipeline-parallel size")
    parser.add_argument("--data-parallel", type=int, default=1, help="data-parallel size")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="replaced if it exists")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="replaced if it exists")
    parser.add_argument("--seed", type=int, default=1234, help="seed of data and weights")
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    for folder in (arguments.out, arguments.data):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        make_data(arguments)
        for number, stage in enumerate(STAGES):
            train(arguments, stage, previous=STAGES[number - 1] if number else None)
    except subprocess.CalledProcessError as error:
        print(
            f"demo: {' '.join(error.cmd[1:4])} ... failed with exit code {error.returncode}", file=sys.stderr
        )
        return RUN_ERROR
    report = question(arguments)
    report["seconds"] = round(time.monotonic() - began, 1)
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return conclude(report, arguments.out)


def start_program(name: str, *arguments: str) -> None:
    """Run a program of this package with its output on the screen."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"{__package__}.{name}", *arguments],
        check=True,
    )


def heading(text: str) -> None:
    """Announce the next part."""
    print(f"\n=== {text}", flush=True)


def make_data(arguments: argparse.Namespace) -> None:
    """Draw and index the data set."""
    heading("data: images with shapes and digits, all tasks, English and Chinese")
    data = str(arguments.data.resolve())
    start_program("make_demo_data", "--out", data, "--seed", str(arguments.seed))
    folders = sorted({str(shard.parent) for shard in entries_below(Path(data)) if shard.suffix == ".tar"})
    start_program("index_shards", *folders)


def train(arguments: argparse.Namespace, stage: str, previous: str | None) -> None:
    """Train one stage from the weights of the one before."""
    out = arguments.out.resolve()
    start: list[str] = []
    if previous is not None:
        heading(f"transition: {previous} -> {stage}")
        weights = str(out / f"{stage}_start")
        start_program(
            "convert_checkpoint",
            "next-stage",
            "--from",
            str(out / previous),
            "--to",
            stage,
            "--out",
            weights,
        )
        start = ["--checkpoint.init_from", weights]
    processes = arguments.tensor * arguments.pipeline * arguments.data_parallel
    heading(f"{stage}: {processes} processes, tensor {arguments.tensor} x pipeline {arguments.pipeline}")
    subprocess.run(
        local_command(
            processes, "-m", "megatron_qwenvl.train",
            "--recipe", f"tiny_{stage}",
            "--run_dir", str(out / stage),
            "--seed", str(arguments.seed),
            "--data.root", str(arguments.data.resolve()),
            "--parallel.tensor", str(arguments.tensor),
            "--parallel.pipeline", str(arguments.pipeline),
            "--parallel.sequence_parallel", str(arguments.tensor > 1).lower(),
            *start,
        ),
        check=True,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip


def question(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the final checkpoint into one process, ask about held-out images, and write the page."""
    heading("questions about held-out images")
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    from megatron_qwenvl.config.load import load_config
    from megatron_qwenvl.data.rendering.tokenizer import load_tokenizer
    from megatron_qwenvl.demo.answers import Answers
    from megatron_qwenvl.demo.dataset import TEST_TASKS
    from megatron_qwenvl.demo.examination import evaluate_demo, read_questions, show_examples
    from megatron_qwenvl.engine.start import start_engine, stop_engine
    from megatron_qwenvl.inference.generate import Generator

    config = load_config("tiny_stage3", ["--data.root", str(arguments.data.resolve())])
    runtime = start_engine(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    generator = Generator.load(arguments.out / "stage3", config, tokenizer, runtime)
    answer = Answers(generator, config, tokenizer)
    tests = {task: read_questions(arguments.data / "test" / task) for task in TEST_TASKS}
    scores = evaluate_demo(answer, tests["vqa"], tests["ocr_vqa"], tests["referring"], tests["caption"])
    examples = {
        title: show_examples(answer, tests[task][:EXAMPLES]) for task, title in SECTIONS.items()
    }  # fmt: skip
    stop_engine()
    for example in examples[SECTIONS["vqa"]]:
        print(f"  {example.question}  {example.answer}  (expected: {example.expected})")
    for name, value in scores.items():
        print(f"  {name}: {value:.3f}", flush=True)
    write_page(arguments.out, scores, examples)
    return dict(scores)


def write_page(out: Path, scores: dict[str, float], examples: Mapping[str, list[Example]]) -> None:
    """Write OUT/report.html."""
    from megatron_qwenvl.evaluation.curves import loss_chart
    from megatron_qwenvl.evaluation.report import Report, render_report

    report = Report(
        title="A tiny Qwen-VL after its three stages",
        summary="Held-out images that the model never saw, answered by greedy decoding.",
        charts=[loss_chart(out / stage, stage) for stage in STAGES],
        scores=scores,
        examples=examples,
    )
    (out / "report.html").write_text(render_report(report), encoding="utf-8")


def conclude(report: dict[str, Any], out: Path) -> int:
    """Say what came out."""
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


def run() -> NoReturn:
    """Run the program and exit with its code."""
    run_program("demo", main)


if __name__ == "__main__":
    run()
