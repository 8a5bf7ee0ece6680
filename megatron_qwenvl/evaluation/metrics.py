"""Scores of generated text against reference answers; pure functions."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from random import Random

NormalizedBox = tuple[float, float, float, float]

_BOX = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*,\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)")
_CLOSING = ".。!！?？"


def normalize_answer(text: str) -> str:
    """Normalize an answer: NFKC, lower case, single blanks, no final punctuation mark."""
    folded = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return folded.rstrip(_CLOSING).rstrip()


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Compute the share of answers that equal the expected ones after `normalize_answer`.

    Raises:
        ValueError: different numbers of answers and expectations, or none.
    """
    _check_lengths(answers, expected)
    hits = sum(normalize_answer(a) == normalize_answer(e) for a, e in zip(answers, expected, strict=True))
    return hits / len(expected)


def parse_box(text: str) -> NormalizedBox | None:
    """First `(x1,y1),(x2,y2)` in the text that has an area, in the text's units; None without one."""
    for match in _BOX.finditer(text):
        x1, y1, x2, y2 = (float(number) for number in match.groups())
        if x1 < x2 and y1 < y2:
            return x1, y1, x2, y2
    return None


def box_iou(a: NormalizedBox, b: NormalizedBox) -> float:
    """Intersection over union of two boxes `(x1, y1, x2, y2)` in the same units."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return intersection / (areas - intersection)


def box_accuracy(answers: Sequence[str], expected: Sequence[NormalizedBox], iou: float = 0.5) -> float:
    """Compute the share of answers whose first box has an IoU of at least `iou` with the expected one.

    Args:
        answers: generated texts.
        expected: boxes in units of 1/1000 of the image.

    Raises:
        ValueError: different numbers of answers and expectations, or none.
    """
    _check_lengths(answers, expected)
    boxes = [parse_box(answer) for answer in answers]
    hits = sum(a is not None and box_iou(a, e) >= iou for a, e in zip(boxes, expected, strict=True))
    return hits / len(expected)


def derange_within_groups(groups: Sequence[str], rng: Random) -> list[int]:
    """Draw a permutation that moves every element to another place of its own group.

    With images exchanged only between equal questions, each question still makes sense for its image and the
    distribution of answers is unchanged: only the relation of image and answer is lost.

    Returns:
        For each place the index of the element that moves there; the element of a group of one stays.
    """
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    source = list(range(len(groups)))
    for places in members.values():
        order = rng.sample(places, len(places))
        for place, taken in zip(order, order[1:] + order[:1], strict=True):
            source[place] = taken
    return source


def blind_accuracy(questions: Sequence[str], expected: Sequence[str]) -> float:
    """Compute the chance level: the exact match of the best answers that depend only on the question.

    Raises:
        ValueError: different numbers of questions and expectations, or none.
    """
    _check_lengths(questions, expected)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in zip(questions, expected, strict=True):
        answers[question][normalize_answer(answer)] += 1
    return sum(counts.most_common(1)[0][1] for counts in answers.values()) / len(expected)


def _check_lengths(answers: Sequence[object], expected: Sequence[object]) -> None:
    if not expected or len(answers) != len(expected):
        raise ValueError(f"expected as many answers as questions and at least one, found {len(answers)} and "
                         f"{len(expected)}")  # fmt: skip
