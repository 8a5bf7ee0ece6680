"""docs/sample_path.md names functions that exist, hop by hop."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/sample_path.md").read_text(encoding="utf-8")
HOPS = re.findall(r"^\| (\d+) \|.*\| `([\w/]+\.py)` \| `([\w.]+)` \|$", PAGE, re.MULTILINE)
IN_TEXT = re.findall(r"`([\w.]+)`\s+in\s+`([\w/]+\.py)`", PAGE)


def defined(path: str) -> set[str]:
    """Names of the functions, classes and methods of a module of the package."""
    found = set()
    for node in ast.parse((ROOT / "megatron_qwenvl" / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


def test_the_page_names_ten_hops() -> None:
    assert [int(number) for number, _, _ in HOPS] == list(range(1, 11))
    assert len(IN_TEXT) >= 4


@pytest.mark.parametrize(("path", "name"), [*((p, n) for _, p, n in HOPS), *((p, n) for n, p in IN_TEXT)])
def test_a_named_function_exists(path: str, name: str) -> None:
    assert name in defined(path)
