"""The window of unreadable samples."""

from __future__ import annotations

import pytest

from megatron_qwenvl.training.unreadable import RecentUnreadable, exceeds_share, slide_window, worst_shards


def after(steps: list[tuple[int, int]], window: int) -> RecentUnreadable:
    """The window after steps of (samples, unreadable)."""
    recent: RecentUnreadable = ()
    seen = 0
    for samples, unreadable in steps:
        seen += samples
        recent = slide_window(recent, seen, samples, unreadable, window)
    return recent


@pytest.mark.parametrize(
    ("steps", "window", "inside"),
    [
        ([(4, 1), (4, 0), (4, 2)], 12, 3),
        ([(4, 1), (4, 0), (4, 2)], 11, 2),
        ([(4, 1), (4, 3), (4, 0)], 8, 3),
        ([(4, 1), (4, 3), (4, 0), (4, 0)], 8, 0),
        ([(4, 1), (4, 3)], 1, 3),
    ],
)
def test_what_the_window_holds(steps: list[tuple[int, int]], window: int, inside: int) -> None:
    """Steps that lie within it as a whole, and always the newest one."""
    assert sum(count for _, count in after(steps, window)) == inside


def test_a_window_that_is_not_full_yet_counts_as_a_full_one() -> None:
    assert not exceeds_share(((4, 4),), batch=4, window=40, share=0.1)
    assert exceeds_share(((4, 4), (8, 1)), batch=4, window=40, share=0.1)
    assert exceeds_share(((40, 5),), batch=40, window=1, share=0.1)
    assert not exceeds_share(((4, 4),), batch=4, window=4, share=1.0)
    assert exceeds_share(((4, 1),), batch=4, window=4, share=0.0)


def test_a_sample_that_several_ranks_read_counts_once() -> None:
    tensor_ranks = [(8, "b.tar", "1"), (16, "b.tar", "1"), (8, "a.tar", "7")]
    assert worst_shards([tensor_ranks, tensor_ranks[:2], []]) == "b.tar (2), a.tar (1)"
    many = [(8, f"{letter}.tar", "0") for letter in "abcdefg"]
    assert worst_shards([many]).endswith("e.tar (1) and 2 more")
