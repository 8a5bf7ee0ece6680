"""The demo's examination of a trained model: answers to held-out questions, scores, and the report page."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_qwenvl.config.load import load_config
from megatron_qwenvl.data.rendering.tokenizer import load_decoder_tokenizer
from megatron_qwenvl.engine.start import start_engine, stop_engine
from megatron_qwenvl.evaluation.curves import loss_chart
from megatron_qwenvl.evaluation.report import Example, Report, render_report
from megatron_qwenvl.inference.generate import Generator

from .answers import Answers
from .dataset import TEST_TASKS
from .examination import evaluate_demo, read_questions, show_examples
from .training import STAGES, DemoRun, heading

EXAMPLES = 12
"""Questions of each task that are shown with their answers."""
SECTIONS = {
    "vqa": "Questions about the image",
    "referring": "Where is it?",
    "ocr_vqa": "Digits in the image",
    "caption": "Captions",
}
"""Tasks of the held-out questions, in the order of the page."""


def question_model(demo: DemoRun) -> dict[str, Any]:
    """Load the final checkpoint into one process, ask about held-out images, and write the page."""
    heading("questions about held-out images")
    warnings.filterwarnings("ignore", module=r"megatron\.core")

    config = load_config("tiny_stage3", ["--data.root", str(demo.data.resolve())])
    runtime = start_engine(config)
    tokenizer = load_decoder_tokenizer(config)
    generator = Generator.load(demo.out / "stage3", config, tokenizer, runtime)
    answer = Answers(generator, config, tokenizer)
    tests = {task: read_questions(demo.data / "test" / task) for task in TEST_TASKS}
    scores = evaluate_demo(answer, tests["vqa"], tests["ocr_vqa"], tests["referring"], tests["caption"])
    examples = {
        title: show_examples(answer, tests[task][:EXAMPLES]) for task, title in SECTIONS.items()
    }  # fmt: skip
    stop_engine()
    for example in examples[SECTIONS["vqa"]]:
        print(f"  {example.question}  {example.answer}  (expected: {example.expected})")
    for name, value in scores.items():
        print(f"  {name}: {value:.3f}", flush=True)
    write_page(demo.out, scores, examples)
    return dict(scores)


def write_page(out: Path, scores: dict[str, float], examples: Mapping[str, list[Example]]) -> None:
    """Write OUT/report.html."""
    report = Report(
        title="A tiny Qwen-VL after its three stages",
        summary="Held-out images that the model never saw, answered by greedy decoding.",
        charts=[loss_chart(out / stage, stage) for stage in STAGES],
        scores=scores,
        examples=examples,
    )
    (out / "report.html").write_text(render_report(report), encoding="utf-8")
