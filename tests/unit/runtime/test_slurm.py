"""Asking Slurm about a job: only an answer counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_qwenvl.runtime.slurm import is_job_over


@pytest.mark.parametrize(
    ("squeue", "over"),
    [
        ("echo RUNNING", False),
        ("echo PENDING", False),
        ("echo COMPLETING", False),
        ("echo FAILED", True),
        ("echo TIMEOUT", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        (
            "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1",
            None,
        ),
        ("exit 1", None),
        ("exit 0", None),
    ],
)
def test_only_an_answer_counts(
    squeue: str, over: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = tmp_path / "squeue"
    client.write_text(f'#!/bin/bash\n[[ "$*" == *"--job 17 "* ]] || exit 9\n{squeue}\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert is_job_over("17") is over


def test_without_a_client_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert is_job_over("17") is None
