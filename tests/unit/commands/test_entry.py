"""The end of a command-line program."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
from megatron_qwenvl.commands.entry import run_program

def main():
    {body}
    return 0

run_program("tool", main)
"""


def run(body: str, reader: str) -> tuple[int, str, str]:
    """Exit code of the program, what `reader` made of its output, and its standard error."""
    program = [sys.executable, "-c", PROGRAM.format(body=body)]
    script = f'"$@" | {reader}; echo "exit code ${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", script, "-", *program], capture_output=True, text=True, check=True)
    output, _, code = done.stdout.rpartition("exit code ")
    return int(code), output, done.stderr


def test_a_reader_that_has_seen_enough_is_no_crash() -> None:
    assert run("print('line\\n' * 100_000)", "head -1") == (1, "line\n", "")


def test_another_broken_pipe_is_a_crash() -> None:
    code, _, said = run("raise BrokenPipeError('of a worker')", "cat")
    assert code == 70 and "of a worker" in said


@pytest.mark.parametrize("module", ["train", "commands.preflight"])
def test_an_unexpected_error_before_the_start_is_a_crash(module: str) -> None:
    program = f"""
from megatron_qwenvl.config import cli
cli.parse_start_arguments = lambda *_, **__: 1 / 0
from megatron_qwenvl.{module} import run
run()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 70, done.stderr
    assert "ZeroDivisionError" in done.stderr
