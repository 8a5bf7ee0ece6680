"""A fault of the source, and the tests that promise to notice it."""

from __future__ import annotations

from dataclasses import dataclass

PACKAGE = "megatron_qwenvl"


@dataclass(frozen=True)
class Mutant:
    """A fault of the source.

    Attributes:
        name: what is broken, unique.
        file: path below the repository.
        old: text that stands exactly once in the file.
        new: what replaces it.
        tests: pytest arguments; at least one of these tests fails under the fault.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_TRAINING = "tests/recipe/test_equals_plain_training.py::"
STAGE1 = (f"{_TRAINING}test_training_is_the_papers[stage1]",)
STAGE2 = (f"{_TRAINING}test_training_is_the_papers[stage2]",)
STAGE3 = (f"{_TRAINING}test_training_is_the_papers[stage3]",)
TENSOR_PARALLEL = (f"{_TRAINING}test_a_layout_trains_the_same[stage2-tp2_pp2_sp]",)
DATA_PARALLEL = (f"{_TRAINING}test_a_layout_trains_the_same[stage2-dp2]",)
OFF = (f"{_TRAINING}test_what_is_switched_off_does_nothing",)
FULL_SIZE = ("tests/recipe/test_full_size.py",)
