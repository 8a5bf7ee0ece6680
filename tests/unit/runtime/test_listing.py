from __future__ import annotations

import ast
import errno
from pathlib import Path

import pytest

from megatron_qwenvl.runtime.listing import entries_below, matching_entries
from tests.faulty_files import FaultyFiles

PACKAGE = Path(__file__).parents[3] / "megatron_qwenvl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("run/step_1/model/a", "run/step_2/b", "run/latest"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "run"


def test_entries_are_found_as_by_glob(folder: Path) -> None:
    for pattern in ("step_*", "*", "latest", "*.tmp"):
        assert sorted(matching_entries(folder, pattern)) == sorted(folder.glob(pattern))
    assert sorted(entries_below(folder)) == sorted(folder.rglob("*"))


def test_what_is_no_folder_has_no_entries(folder: Path) -> None:
    assert matching_entries(folder / "checkpoints", "*") == []
    assert matching_entries(folder / "latest", "*") == []


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_listed_is_not_empty(
    folder: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    FaultyFiles(monkeypatch, folder.parent, error, times=10**9)
    with pytest.raises(OSError) as raised:
        matching_entries(folder, "*")
    assert raised.value.errno == error
    with pytest.raises(OSError) as raised:
        entries_below(folder)
    assert raised.value.errno == error


def test_the_package_lists_folders_by_these_functions_alone() -> None:
    calls = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.func.attr}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in {"glob", "rglob", "iglob", "walk"} and path.name != "listing.py"
    ]
    assert calls == []
