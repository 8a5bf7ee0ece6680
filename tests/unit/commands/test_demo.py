"""The demo's message names the program that failed."""

from __future__ import annotations

import subprocess

import pytest

from megatron_qwenvl.commands.demo import name_program
from megatron_qwenvl.demo.training import start_program
from megatron_qwenvl.runtime.torchrun import local_command


def test_a_failed_program_is_named_by_module_and_arguments() -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        start_program("run_progress", "--no_such_option")
    assert name_program(failed.value.cmd) == "megatron_qwenvl.commands.run_progress --no_such_option"
    command = local_command(4, "-m", "megatron_qwenvl.train", "--recipe", "tiny_stage1")
    assert name_program(command) == "megatron_qwenvl.train --recipe tiny_stage1"
