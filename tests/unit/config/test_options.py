"""Options are written like fields; the spelling of earlier versions works for one version, with a warning."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from megatron_qwenvl.commands.convert_checkpoint import _parser
from megatron_qwenvl.config.cli import parse_start_arguments

PACKAGE = Path(__file__).parents[3] / "megatron_qwenvl"


def test_an_old_spelling_works_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = _parser().parse_args(
        ["import-qwenvl", "--from", "a-b", "--out", "c", "--accept-drift", "--dry-run"]
    )
    assert arguments.accept_drift and arguments.dry_run and str(arguments.source) == "a-b"
    warned = capsys.readouterr().err
    assert "--dry-run is written --dry_run" in warned and "--accept-drift is written --accept_drift" in warned
    assert _parser().parse_args(["verify", "x-y"]).checkpoint == Path("x-y")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("quiet", "lines"), [(False, 1), (True, 0)])
def test_the_trainer_takes_both(quiet: bool, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--from_step", "--from-step"):
        found = parse_start_arguments(["--recipe", "tiny_stage1", option, "3"], "train", "", quiet=quiet)
        assert found.from_step == 3
    assert capsys.readouterr().err.count("\n") == lines
    with pytest.raises(SystemExit) as end:
        parse_start_arguments(
            ["--recipe", "tiny_stage1", "--print-value", "train.steps"], "train", "", quiet=True
        )
    assert end.value.code == 0 and capsys.readouterr().out.strip().isdecimal()


def test_every_option_is_written_with_underscores() -> None:
    wrong = [
        f"{path.name}: {option.value}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
        for option in node.args
        if isinstance(option, ast.Constant) and "-" in str(option.value).lstrip("-")
    ]
    assert wrong == []
