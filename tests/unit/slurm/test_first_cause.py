"""What a job's log is taken to say about its end (slurm/prologue.sh)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LOST = "1: 2026-01-01 10:00:01,000 [rank 1] FAILED (lost peer) Connection closed by peer"
SRUN_ENDS_OTHERS = "srun: error: node1: task 0: Terminated"


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        pytest.param(
            [LOST, "0: 2026-01-01 10:00:02,000 [rank 0] FAILED (error) DataError: a.tar: gone"],
            "[rank 0] FAILED (error) DataError: a.tar: gone",
            id="a cause before its consequences",
        ),
        pytest.param(
            [LOST, "srun: error: node2: task 3: Killed", SRUN_ENDS_OTHERS],
            "srun: error: node2: task 3: Killed",
            id="killed",
        ),
        pytest.param(
            ["slurmstepd-node2: error: Detected 1 oom_kill event in StepId=7.0.", LOST],
            "slurmstepd-node2: error: Detected 1 oom_kill event in StepId=7.0.",
            id="out of memory",
        ),
        pytest.param(
            ["1: 2026-01-01 10:00:01,000 [rank 1] FAILED (hang) no sign of life for 900 s in step 7"],
            "[rank 1] FAILED (hang) no sign of life for 900 s in step 7",
            id="hang",
        ),
        pytest.param(
            [LOST, SRUN_ENDS_OTHERS], "[rank 1] FAILED (lost peer) Connection closed by peer", id="lost"
        ),
        pytest.param(["0: step 1/2", SRUN_ENDS_OTHERS], "exit code 143", id="nothing said"),
    ],
)
def test_the_first_cause_of_the_last_attempt_is_found(lines: list[str], cause: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    earlier = ["=== attempt 1 of job 7", "0: 2026-01-01 09:00:00,000 [rank 0] FAILED (crash) earlier"]
    log.write_text("\n".join([*earlier, "=== attempt 2 of job 7", *lines]) + "\n")
    script = f'source "{ROOT}/slurm/prologue.sh"; log="{log}"; first_cause 143'
    env = {**os.environ, "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NAME": "stage1", "SITE": "/dev/null"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.strip()) == (0, cause), done.stderr


EXITED = "srun: error: node1: task {}: Exited with exit code {}"


@pytest.mark.parametrize(
    ("lines", "code", "interrupted"),
    [
        pytest.param([EXITED.format(0, 75), EXITED.format(1, 75)], 75, True, id="all were asked and saved"),
        pytest.param([LOST, EXITED.format(1, 70), EXITED.format(0, 75)], 75, True, id="one was faster"),
        pytest.param(
            ["1: [rank 1] FAILED (error) DataError: a.tar: gone", EXITED.format(1, 1), EXITED.format(0, 75)],
            75,
            False,
            id="one failed while the others started, and srun asked them to stop",
        ),
        pytest.param(
            [EXITED.format(1, 1), SRUN_ENDS_OTHERS], 143, False, id="one failed, and srun ended the others"
        ),
        pytest.param([SRUN_ENDS_OTHERS, EXITED.format(1, 75)], 143, True, id="one was not ready to save"),
    ],
)
def test_what_the_first_rank_died_of_decides_what_an_exit_code_means(
    lines: list[str], code: int, interrupted: bool, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join(["=== attempt 1 of job 7", *lines]) + "\n")
    script = f'source "{ROOT}/slurm/prologue.sh"; log="{log}"; was_interrupted {code} && echo yes || echo no'
    env = {**os.environ, "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NAME": "stage1", "SITE": "/dev/null"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == ("yes" if interrupted else "no"), done.stderr
