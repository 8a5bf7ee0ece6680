"""Every room of checkpoint/ says what is in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import megatron_qwenvl.checkpoint

ROOT = Path(megatron_qwenvl.checkpoint.__file__).parent


@pytest.mark.parametrize("room", ["storage", "formats", "convert", "run"])
def test_the_docstring_of_a_room_names_its_modules(room: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
    assert text
    modules = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"}
    missing = modules - set(re.findall(r"[a-z0-9_]+", text))
    assert not missing, f"not named: {sorted(missing)}"
    gone = set(re.findall(r"^([a-z0-9_]+) ", text, re.M)) - modules
    assert not gone, f"named, but gone: {sorted(gone)}"
