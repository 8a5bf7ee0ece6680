"""The table of mutants fits the source; that their tests notice them is checked by `make mutants`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.mutants.mutant import Mutant
from tests.mutants.table import MUTANTS

ROOT = Path(__file__).parents[2]


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_can_be_run(mutant: Mutant) -> None:
    """A change of the source moves the mutant's text along: look it up in `tests/mutants` and mend it there."""
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, (
        f"{mutant.file} holds {mutant.old!r} {source.count(mutant.old)} times"
    )
    changed = source.replace(mutant.old, mutant.new)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    for test in mutant.tests:
        file, _, rest = test.partition("::")
        name = re.match(r"\w*", rest)
        assert name is not None and f"def {name[0]}" in (ROOT / file).read_text(encoding="utf-8"), test
