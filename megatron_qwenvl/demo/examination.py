"""Scores of a model's answers about held-out drawn images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.images import image_size
from megatron_qwenvl.data.records.coordinates import normalise
from megatron_qwenvl.data.records.tasks import VQA, Caption, Referring, TaskRecord, decode_record
from megatron_qwenvl.data.shards.listing import list_shards
from megatron_qwenvl.data.shards.samples import read_member, scan_shard
from megatron_qwenvl.evaluation.metrics import (
    NormalizedBox,
    blind_accuracy,
    box_accuracy,
    derange_within_groups,
    exact_match,
    normalize_answer,
)
from megatron_qwenvl.evaluation.report import Example, box_polygon, find_shapes


@dataclass(frozen=True)
class Question:
    """A sample to be answered.

    Attributes:
        record: the question; without its answer when a model is asked.
        images: file name (`png`, `0.png`) and encoded bytes of each image.
    """

    record: TaskRecord
    images: tuple[tuple[str, bytes], ...]


AnswerFunction = Callable[[Sequence[Question]], list[str]]
"""Greedy answers to questions, in their order."""


def read_questions(directory: Path) -> list[Question]:
    """Read the samples of a directory of shards, in their order.

    Raises:
        DataError: no such directory, no shard in it, or a damaged shard.
        SampleError: a malformed record.
    """
    questions = []
    for path in list_shards(directory):
        with path.open("rb") as file:
            for sample in scan_shard(file, path):
                if sample.problem:
                    raise DataError(f"{path}:{sample.key}: {sample.problem}")
                members = {
                    name: read_member(file.fileno(), member) for name, member in sample.members.items()
                }
                if "json" not in members:
                    raise DataError(f"{path}: sample {sample.key!r} has no .json")
                record = decode_record("json", members.pop("json"))
                questions.append(Question(record, tuple(members.items())))
    return questions


def evaluate_demo(
    answer: AnswerFunction,
    vqa: Sequence[Question],
    ocr_vqa: Sequence[Question],
    referring: Sequence[Question],
    captions: Sequence[Question],
    seed: int = 0,
) -> dict[str, float]:
    """Question a model about held-out images.

    Args:
        answer: the model; it is given no answers.
        vqa: questions with their answers; asked twice, the second time with the images exchanged between
            equal questions.
        ocr_vqa: questions about what is written in the image.
        referring: phrases with their boxes.
        captions: images with their captions.
        seed: seed of the exchange.

    Returns:
        Shares between 0 and 1: `vqa_accuracy`, `vqa_accuracy_shuffled_images`, `vqa_chance` (the best that
        can be had from the question alone), `ocr_vqa_accuracy`, `referring_accuracy_iou50`, `caption_exact_match`.
    """
    texts, expected = _asked(vqa)
    source = derange_within_groups(texts, Random(seed))
    shuffled = [replace(question, images=vqa[i].images) for question, i in zip(vqa, source, strict=True)]
    described = [q.record.caption or "" for q in captions if isinstance(q.record, Caption)]
    boxes = [_expected_box(question) for question in referring]
    return {
        "vqa_accuracy": exact_match(answer(_unanswered(vqa)), expected),
        "vqa_accuracy_shuffled_images": exact_match(answer(_unanswered(shuffled)), expected),
        "vqa_chance": blind_accuracy(texts, expected),
        "ocr_vqa_accuracy": exact_match(answer(_unanswered(ocr_vqa)), _asked(ocr_vqa)[1]),
        "referring_accuracy_iou50": box_accuracy(answer(_unanswered(referring)), boxes),
        "caption_exact_match": exact_match(answer(_unanswered(captions)), described),
    }


def show_examples(answer: AnswerFunction, questions: Sequence[Question]) -> list[Example]:
    """Questions with the model's answers, for a report; boxes of both sides are drawn."""
    answers = answer(_unanswered(questions))
    return [_example(question, found) for question, found in zip(questions, answers, strict=True)]


def _example(question: Question, answer: str) -> Example:
    record, image = question.record, question.images[0][1]
    if isinstance(record, Referring):
        box = _expected_box(question)
        right = box_accuracy([answer], [box]) == 1
        return Example(
            image, record.phrase, answer, right=right,
            true_shapes=(box_polygon(box),), predicted_shapes=find_shapes(answer),
        )  # fmt: skip
    asked = record.question if isinstance(record, VQA) else "Generate the caption:"
    expected = (record.answer if isinstance(record, VQA) else getattr(record, "caption", None)) or ""
    return Example(
        image, asked, answer, expected, right=normalize_answer(answer) == normalize_answer(expected)
    )


def _asked(questions: Sequence[Question]) -> tuple[list[str], list[str]]:
    """Questions and expected answers."""
    records = [question.record for question in questions if isinstance(question.record, VQA)]
    return [record.question for record in records], [record.answer or "" for record in records]


def _unanswered(questions: Sequence[Question]) -> list[Question]:
    """Remove the answers from questions, so that a model cannot copy them."""
    keys: dict[type[TaskRecord], str] = {VQA: "answer", Caption: "caption", Referring: "boxes"}
    return [
        replace(question, record=question.record.model_copy(update={keys[type(question.record)]: None}))
        for question in questions
    ]


def _expected_box(question: Question) -> NormalizedBox:
    """Return the only box of a referring sample in thousandths of its image."""
    record = question.record
    if not isinstance(record, Referring) or not record.boxes:
        raise ValueError(f"expected a referring sample with a box, found {record}")
    width, height = image_size(question.images[0][1])
    x1, y1, x2, y2 = record.boxes[0]
    return (*normalise((x1, y1), width, height), *normalise((x2, y2), width, height))
