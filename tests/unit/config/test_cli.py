"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from megatron_qwenvl.config.cli import (
    HEAD_START_SECONDS,
    describe_fields,
    parse_start_arguments,
    show_value,
)
from megatron_qwenvl.config.fields import leaf_paths
from megatron_qwenvl.config.load import load_config

PROGRAM = """
import sys
from megatron_qwenvl.config.cli import parse_start_arguments
config = parse_start_arguments(sys.argv[1:], "train", "Train a model.", world_size=1).config
print(config.name, config.train.steps, sorted({"torch", "megatron", "numpy"} & set(sys.modules)))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60
    )


def test_arguments_become_a_configuration_without_heavy_imports() -> None:
    result = run("--train.steps", "700", "--recipe", "stage1", "--optimizer.lr=1e-3")
    assert (result.returncode, result.stdout, result.stderr) == (0, "stage1 700 []\n", "")


def test_print_config_prints_what_a_file_can_hold(tmp_path) -> None:
    result = run("--recipe", "stage2", "--print_config", "--train.steps", "700")  # needs two processes to run
    assert (result.returncode, result.stderr) == (0, "")
    file = tmp_path / "run.yaml"
    file.write_text(result.stdout)
    assert load_config(str(file)) == load_config("stage2", ["--train.steps=700"])


@pytest.mark.parametrize(
    "value", ["runs/exp #3", "a \"b\" 'c'", "line 1\nline: 2", " x *", "2026-01-01", "Läufe/运行"]
)
def test_print_value_prints_text_as_it_is(value: str) -> None:
    result = run("--recipe", "stage2", "--print_value", "run_dir", "--run_dir", json.dumps(value))
    assert (result.returncode, result.stdout, result.stderr) == (0, value + "\n", "")


def test_print_value_prints_anything_else_as_json() -> None:
    shown = {
        path: show_value(load_config("stage1"), path)
        for path in ("train.steps", "checkpoint.init_from", "parallel")
    }
    assert (shown["train.steps"], shown["checkpoint.init_from"]) == ("50000", "null")
    assert json.loads(shown["parallel"])["tensor"] == 1
    result = run("--recipe", "stage1", "--print_value", "steps")
    assert (result.returncode, result.stdout) == (2, "")
    assert "steps: unknown key; did you mean train.steps?" in result.stderr


def test_a_value_that_looks_like_an_option_is_a_value() -> None:
    arguments = ["--recipe", "stage1", "--name", "-h", "--run_dir", "- a"]
    config = parse_start_arguments(arguments, "train", "Train a model.").config
    assert (config.name, config.run_dir) == ("-h", "- a")


def test_help_explains_every_field_at_once() -> None:
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    missing = [path for path in leaf_paths() if f"  --{path}  " not in result.stdout]
    assert not missing
    for text in (
        "usage: train --recipe NAME|FILE.yaml",
        "  --data.packing  none|isolated|interleaved  (default isolated)",
        "  --parallel.layout  list of integer or null  (default null)",
        "  --optimizer.sharded  true|false  (default true)",
        "      Side in pixels to which every image is resized; a multiple of the patch size.",
        "  weight  number  (default 1.0)",
        "  path  text  (default required)",
    ):
        assert text in result.stdout


def test_every_field_has_a_meaning() -> None:
    lines = describe_fields().splitlines()
    bare = [
        a
        for a, b in zip(lines, [*lines[1:], ""], strict=True)
        if a.startswith("  --") and not b.startswith("      ")
    ]
    assert bare == []


@pytest.mark.parametrize("argument", ["--help", "--print_config"])
def test_a_reader_that_leaves_early_is_no_error(argument: str) -> None:
    command = [sys.executable, "-c", PROGRAM, "--recipe", "stage1", argument]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--recipe", "stage1", "--train.stpes", "5"],
            "train.stpes: unknown key (--train.stpes); did you mean train.steps?",
        ),
        (["--recipe", "stage2"], "expected a number of processes that is a multiple of 2 x 1 = 2, found 1"),
        (["--recipe", "stage7"], "unknown recipe 'stage7'"),
        (["--train.steps", "5"], "the following arguments are required: --recipe"),
        (
            ["--recipe", "stage1", "--from_step", "newest"],
            "argument --from_step: expected the number of a step, found 'newest'",
        ),
        (["--rec", "stage1"], "the following arguments are required: --recipe"),
    ],
)
def test_bad_input_is_explained_without_a_traceback(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_an_older_step_is_no_field_of_the_configuration() -> None:
    arguments = parse_start_arguments(
        ["--recipe", "tiny_stage1", "--from_step", "20", "--seed", "3"], "train", ""
    )
    assert (arguments.from_step, arguments.config.seed) == (20, 3)
    assert (
        arguments.config
        == parse_start_arguments(["--recipe", "tiny_stage1", "--seed", "3"], "train", "").config
    )
    assert parse_start_arguments(["--recipe", "tiny_stage1"], "train", "").from_step is None


def test_only_one_process_needs_to_speak_and_the_others_let_it_finish(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(SystemExit) as stopped:
        parse_start_arguments(["--recipe", "stage1", "--seed", "x"], "train", "", quiet=True)
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "")
    assert waited == [HEAD_START_SECONDS]
