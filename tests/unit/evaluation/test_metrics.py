"""Scores of generated text."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from megatron_qwenvl.evaluation.metrics import (
    blind_accuracy,
    box_accuracy,
    box_iou,
    derange_within_groups,
    exact_match,
    normalize_answer,
    parse_box,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" Top  Left. ", "top left"), ("红。", "红"), ("７", "7"), ("a.b", "a.b"), ("yes!?", "yes"), ("", "")],
)
def test_normalize_answer(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_exact_match_counts_whole_answers() -> None:
    assert exact_match(["Red", "top", "7"], ["red", "top left", "8"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("answers", [[], ["a"]])
def test_exact_match_rejects_unequal_or_no_answers(answers: list[str]) -> None:
    with pytest.raises(ValueError, match=f"found {len(answers)} and {2 if answers else 0}"):
        exact_match(answers, ["a", "b"] if answers else [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<box>(10,20),(300,400)</box><box>(1,2),(3,4)</box>", (10, 20, 300, 400)),
        ("(5, 6), (7, 8)", (5, 6, 7, 8)),
        ("(9,9),(1,1) or (1,1),(9,9)", (1, 1, 9, 9)),
        ("<box>(1,2),(3,</box>", None),
        ("top left", None),
    ],
)
def test_parse_box(text: str, expected: tuple[float, ...] | None) -> None:
    assert parse_box(text) == expected


def test_box_iou() -> None:
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(2 / 6)
    assert box_iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert box_iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0


def test_box_accuracy_at_the_threshold() -> None:
    expected = (0.0, 0.0, 100.0, 100.0)
    half, less = "(0,0),(100,50)", "(0,0),(100,49)"
    assert box_accuracy([half, less, "nothing"], [expected] * 3) == pytest.approx(1 / 3)


def test_derangement_moves_everything_within_its_group() -> None:
    groups = ["a", "b", "a", "b", "a", "c", "b"]
    source = derange_within_groups(groups, Random(3))
    assert sorted(source) == list(range(7))
    assert [groups[i] for i in source] == groups
    assert [place for place, taken in enumerate(source) if place == taken] == [5]


def test_derangements_differ_and_reach_every_place() -> None:
    seen = Counter(derange_within_groups(["q"] * 4, Random(seed))[0] for seed in range(200))
    assert set(seen) == {1, 2, 3}


def test_blind_accuracy_answers_each_question_with_its_most_frequent_answer() -> None:
    questions = ["color?"] * 4 + ["digit?"] * 2
    assert blind_accuracy(questions, ["red", "Red", "blue", "green", "1", "2"]) == pytest.approx(3 / 6)
