"""The end of a job as its log tells it."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_log import first_cause, last_message, one_line, read_phase_log
from restart_policy import Phase, was_interrupted

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
    assert first_cause(read_phase_log(log, 0), 143) == cause


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
    lines: list[str], code: int, interrupted: bool
) -> None:
    phase = Phase("preflight", code, "", lines, checkpoint=None, bad_nodes="", ended_by_slurm=False)
    assert was_interrupted(phase) == interrupted


def test_a_phase_is_read_from_its_first_byte(tmp_path: Path) -> None:
    log = tmp_path / "log"
    before = "=== attempt 1\npreflight: FAILED: x\n"
    log.write_text(before + "srun: error: node1: task 0: Killed\n")
    assert "Killed" in first_cause(read_phase_log(log, len(before)), 137)
    assert read_phase_log(tmp_path / "none", 0) == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["it cannot be: because", "srun: error: node1: task 0: Exited with exit code 1", ""], "it cannot be: because"),
        (["srun: error: x", "slurmstepd: error: *** STEP 7.0 ON node1 CANCELLED ***"], "srun: error: x"),
        (["=== attempt 1", " "], "exit code 2"),
    ],
)  # fmt: skip
def test_the_last_message_is_a_programs(lines: list[str], message: str) -> None:
    assert last_message(lines, 2) == message


def test_a_cause_is_one_line_of_whole_characters_whatever_bytes_it_holds() -> None:
    assert one_line("a\tb\r\nc") == "a b  c"
    assert one_line("x" + "运" * 1000).encode() == ("x" + "运" * 666).encode()
    assert one_line("bad \udcff byte") == "bad  byte"
