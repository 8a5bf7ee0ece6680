from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import torch

from megatron_qwenvl import __version__
from megatron_qwenvl.runtime.environment import (
    Gpu,
    describe_environment,
    facts_equal_on_all_ranks,
    git_state,
    recorded_variables,
)
from megatron_qwenvl.runtime.processes import ProcessInfo

PROCESS = ProcessInfo(0, 1, 0, 1, "", "single")


def test_it_is_json() -> None:
    described = replace(describe_environment(PROCESS), gpus=(Gpu("H100", 80 << 30),))
    written = json.loads(json.dumps(described.to_json()))
    assert written.keys() == vars(described).keys()
    assert written["gpus"] == [{"name": "H100", "memory_bytes": 80 << 30}]


def test_the_real_versions_are_told() -> None:
    described = describe_environment(PROCESS)
    installed, _, build = torch.__version__.partition("+")
    assert described.packages["torch"] in (
        installed,
        f"{installed}+{build}",
    )  # PyPI's package does not name its build
    assert described.packages["megatron-qwenvl"] == __version__
    assert described.cuda == torch.version.cuda
    assert described.launcher == "single"


def test_slurms_name_of_the_node_comes_before_the_hosts() -> None:
    assert describe_environment(PROCESS, {"SLURMD_NODENAME": "node7"}).node == "node7"
    described = describe_environment(PROCESS, {})
    assert described.node == described.host


def test_variables_that_matter_are_kept_and_secrets_are_not() -> None:
    env = {
        "SLURM_JOB_ID": "12",
        "NCCL_DEBUG": "INFO",
        "LD_LIBRARY_PATH": "/opt",
        "MASTER_ADDR": "node1",
        "HOME": "/home/me",
        "SLURM_JWT": "x",
        "NCCL_API_KEY": "x",
        "TORCH_hub_Token": "x",
        "OMPI_MCA_PASSWORD_FILE": "x",
        "UCX_SECRET": "x",
    }
    assert list(recorded_variables(env)) == ["LD_LIBRARY_PATH", "MASTER_ADDR", "NCCL_DEBUG", "SLURM_JOB_ID"]


def test_the_checkout_is_told(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path) == (None, None)
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == (commit, True)


def test_a_folder_below_somebody_elses_checkout_is_no_checkout(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "site-packages").mkdir()
    assert git_state(tmp_path / "site-packages") == (None, None)


def test_changed_code_and_another_driver_are_facts() -> None:
    described = replace(
        describe_environment(PROCESS), git_revision="0123456789abcdef", git_dirty=True, driver="580.1"
    )
    facts = facts_equal_on_all_ranks(described)
    assert facts["code"] == "0123456789ab with changes"
    assert facts["GPU driver"] == "580.1"
    assert facts["torch"] == described.packages["torch"]
