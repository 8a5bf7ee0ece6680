"""The demo's scores, on real shards, of answers whose score is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.records.tasks import VQA, Caption, Referring
from megatron_qwenvl.demo.dataset import TEST_TASKS, make_demo_data
from megatron_qwenvl.demo.examination import Question, evaluate_demo, read_questions

Demo = dict[str, list[Question]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    out = tmp_path_factory.mktemp("demo")
    make_demo_data(out, train=100, held_out=96, seed=5)
    return {task: read_questions(out / "test" / task) for task in TEST_TASKS}


def evaluate(demo: Demo, answer: object) -> dict[str, float]:
    return evaluate_demo(answer, demo["vqa"], demo["ocr_vqa"], demo["referring"], demo["caption"])  # type: ignore[arg-type]


class Oracle:
    """Knows every image: answers by the bytes of the image and the question."""

    def __init__(self, demo: Demo) -> None:
        self.known = {}
        for question in (q for questions in demo.values() for q in questions):
            self.known[self._key(question)] = self._truth(question)
        self.leaks: list[object] = []

    def _key(self, question: Question) -> tuple[object, ...]:
        record = question.record
        return (
            question.images,
            record.task,
            getattr(record, "question", None) or getattr(record, "phrase", ""),
        )

    def _truth(self, question: Question) -> str:
        record = question.record
        if isinstance(record, VQA | Caption):
            return str(record.answer if isinstance(record, VQA) else record.caption)
        assert isinstance(record, Referring) and record.boxes
        (x1, y1, x2, y2), side = record.boxes[0], _size(question)
        return f"<box>({x1 * 1000 // side[0]:.0f},{y1 * 1000 // side[1]:.0f})," + (
            f"({x2 * 1000 // side[0]:.0f},{y2 * 1000 // side[1]:.0f})</box>"
        )

    def __call__(self, questions: Sequence[Question]) -> list[str]:
        for question in questions:
            record = question.record
            self.leaks += [getattr(record, key, None) for key in ("answer", "caption", "boxes")]
        return [self.known[self._key(question)] for question in questions]


def _size(question: Question) -> tuple[int, int]:
    data = question.images[0][1]
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")  # a PNG's header


def test_an_oracle_is_right_with_the_images_and_at_chance_with_others(demo: Demo) -> None:
    oracle = Oracle(demo)
    report = evaluate(demo, oracle)
    assert report["vqa_accuracy"] == report["referring_accuracy_iou50"] == report["caption_exact_match"] == 1
    assert report["vqa_chance"] < 0.25
    assert report["vqa_accuracy_shuffled_images"] <= report["vqa_chance"]
    assert not any(oracle.leaks)


def test_answers_without_a_look_score_at_most_chance(demo: Demo) -> None:
    answers = {q.record.question: q.record.answer for q in demo["vqa"] if isinstance(q.record, VQA)}

    def blind(questions: Sequence[Question]) -> list[str]:
        return [str(answers.get(getattr(q.record, "question", ""), "")) for q in questions]

    report = evaluate(demo, blind)
    assert report["vqa_accuracy"] == report["vqa_accuracy_shuffled_images"] <= report["vqa_chance"]
    assert report["referring_accuracy_iou50"] == report["caption_exact_match"] == 0


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent"):
        read_questions(tmp_path / "absent")
