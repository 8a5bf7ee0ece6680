"""What follows the end of a phase of a job, and that the documentation draws the same states."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import job_log
import pytest
import restart_policy
from job_failures import Failure
from job_states import TRANSITIONS, Event, State
from restart_policy import Decision, Phase, RestartLimits, decide, limit_reached

from megatron_qwenvl.runtime import exit_codes

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "slurm/restart_policy.py"
LIMITS = RestartLimits(failures=10, without_progress=3)
AWAY = "Unable to contact|timed out"


def phase(name: str = "training", code: int = 70, *lines: str, signal: str = "", checkpoint: str | None = "step_8",
          bad_nodes: str = "", ended: bool = False) -> Phase:  # fmt: skip
    return Phase(name, code, signal, list(lines), checkpoint, bad_nodes, ended)


def decided(end: Phase, *history: Failure, limits: RestartLimits = LIMITS) -> Decision:
    return decide(end, "7", history, limits, AWAY)


def failed(cause: str = "a", checkpoint: str = "step_8", job: str = "7") -> Failure:
    return Failure(job, checkpoint, cause)


# --- what ended it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["", "SIGTERM"])
@pytest.mark.parametrize("code", [75, 138, 143])
@pytest.mark.parametrize("name", restart_policy.PHASES)
def test_an_interruption_is_requeued_whatever_happened_before(name: str, code: int, signal: str) -> None:
    checkpoint = "step_8" if name == "training" else None
    end = phase(name, code, signal=signal, checkpoint=checkpoint)
    decision = decided(end, *[failed()] * 20)
    assert (decision.state, decision.failure, decision.exclude) == (State.REQUEUED, None, "")
    assert decision.reason.startswith("interrupted")


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (phase("training", 75), "interrupted, saved as step_8"),
        (phase("training", 75, checkpoint="nothing"), "interrupted, nothing saved yet"),
        (phase("preflight", 75, checkpoint="nothing"), "interrupted during preflight, no checkpoint yet"),
        (phase("training", 143), "interrupted during training, newest checkpoint: step_8"),
        (phase("task", 143, signal="SIGUSR1", checkpoint=None), "interrupted by SIGUSR1 during task"),
        (phase("task", 1, "srun: error: Unable to create step for job 7: timed out", checkpoint=None),
         "Slurm could not be reached during task"),
        (phase("training", 137, "srun: error: node1: task 1: Killed"), "srun: error: node1: task 1: Killed"),
        (phase("task", 137, "srun: error: node1: task 0: Killed", checkpoint=None),
         "killed: srun: error: node1: task 0: Killed"),
    ],
)  # fmt: skip
def test_the_reason_of_a_requeue(end: Phase, reason: str) -> None:
    decision = decided(end)
    assert (decision.state, decision.reason) == (State.REQUEUED, reason)


@pytest.mark.parametrize(
    "end",
    [
        phase("configuration", 2, "it cannot be", checkpoint=None),
        phase("preflight", 1, "it cannot be"),
        phase("preflight", 2, "it cannot be"),
        phase("preflight", 3, "it cannot be", checkpoint=None),
        phase("task", 70, "it cannot be", checkpoint=None),
    ],
)
def test_a_verdict_of_a_program_ends_the_job(end: Phase) -> None:
    assert decided(end) == Decision(State.GIVEN_UP, "it cannot be")


@pytest.mark.parametrize("end", [phase(), phase(code=143, signal="SIGTERM"), phase("preflight", 1)])
def test_what_slurm_has_ended_is_neither_requeued_nor_a_failure(end: Phase) -> None:
    decision = decided(end._replace(ended_by_slurm=True), *[failed()] * 20)
    assert decision.state is State.STOPPED and decision.failure is None


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "newest", "limit"),
    [
        ([], failed("a"), ""),
        ([failed("rank 1 on port 2")], failed("rank 3 on port 4"), "twice from the same checkpoint (step_8)"),
        ([failed("a"), failed("b")], failed("a"), "same failure twice"),
        ([failed("a", "nothing")], failed("a", "nothing"), "same failure twice before the first checkpoint"),
        ([failed("a", job="6")], failed("a"), "same failure twice"),
        ([failed("a"), failed("b")], failed("c"), "3 failures without a new checkpoint"),
        ([failed("a", "step_4"), failed("b", "step_4")], failed("a"), ""),
        ([failed("a"), failed("b", "step_4")], failed("a"), ""),
        ([failed(f"{n}", f"step_{n}") for n in range(9)], failed(), "10 failures of this job"),
        ([failed(f"{n}", f"step_{n}", job="6") for n in range(9)], failed(), ""),
    ],
)  # fmt: skip
def test_limits_of_a_run(history: list[Failure], newest: Failure, limit: str) -> None:
    found = limit_reached(history, newest, LIMITS, excluding=False)
    assert limit in found and bool(limit) == bool(found)
    decision = decided(phase(code=70, checkpoint=newest.checkpoint), *history)
    assert decision.failure == Failure("7", newest.checkpoint, "exit code 70")


def test_the_limits_are_the_sites() -> None:
    history = [failed("a"), failed("b"), failed("c")]
    assert limit_reached(history, failed("d"), RestartLimits(10, 5), excluding=False) == ""
    assert "4 failures of this job" in limit_reached(
        history, failed("d"), RestartLimits(4, 9), excluding=False
    )


def test_bad_nodes_are_excluded_and_other_nodes_get_their_attempt() -> None:
    end = phase("preflight", 3, "preflight: FAILED: node2", bad_nodes="node2")
    history = [failed("preflight: FAILED: node1")] * 3
    decision = decided(end, *history)
    assert (decision.state, decision.exclude) == (State.REQUEUED, "node2")
    assert decided(end, *history, limits=RestartLimits(4, 3)).state is State.GIVEN_UP
    assert decided(end._replace(bad_nodes=""), *history).state is State.GIVEN_UP


def test_a_task_that_is_killed_gets_three_attempts() -> None:
    end = phase("task", 137, "srun: error: node1: task 0: Killed", checkpoint=None)
    states = [decided(end, *[failed()] * earlier).state for earlier in range(3)]
    assert states == [State.REQUEUED, State.REQUEUED, State.GIVEN_UP]


# --- states -----------------------------------------------------------------------------------------------------------


def drawn() -> str:
    return (ROOT / "docs/job_states.svg").read_text(encoding="utf-8")


def test_the_documentation_draws_the_states_of_the_code() -> None:
    arrows = re.findall(r"<title>(.+) -&gt; (.+): (.+)</title><path class=\"line\"[^>]*/>(.*)</g>", drawn())
    transitions = [
        (state, event, following)
        for states, following, events, _ in arrows
        for state in states.split(", ")
        for event in events.split("; ")
    ]
    assert sorted(transitions) == sorted(
        (state.value, event.value, following.value) for (state, event), following in TRANSITIONS.items()
    )
    for *_, events, label in arrows:
        assert " ".join(re.findall(r"<text[^>]*>([^<]+)<", label)) == events.replace(";", "")
    assert set(re.findall(r'class="name"[^>]*>([^<]+)<', drawn())) == {state.value for state in State}


def test_the_ends_of_a_job_are_drawn() -> None:
    ends = set(State) - {state for state, _ in TRANSITIONS}
    assert set(re.findall("<title>(.+) is an end</title>", drawn())) == {end.value for end in ends}


def test_every_event_is_drawn_and_every_state_can_be_reached() -> None:
    assert {event for _, event in TRANSITIONS} == set(Event)
    reached = {State.PENDING}
    for _ in State:
        reached |= {following for (state, _), following in TRANSITIONS.items() if state in reached}
    assert reached == set(State)


def test_every_end_of_every_phase_has_a_decision() -> None:
    """Whatever combination comes, the table has an arrow for it."""
    said = [
        "",
        "1: FAILED (crash) x",
        "srun: error: Unable to create step: timed out",
        "srun: error: task 0: Killed",
    ]
    codes = [1, 2, 3, 70, 71, 75, 127, 137, 138, 143, 255]
    found = set()
    for name, code, line, signal, checkpoint, ended in itertools.product(
        restart_policy.PHASES, codes, said, ["", "SIGTERM"], [None, "step_8"], [False, True]
    ):
        found.add(decided(phase(name, code, line, signal=signal, checkpoint=checkpoint, ended=ended)).state)
    assert found == {State.REQUEUED, State.GIVEN_UP, State.STOPPED}


SCRIPTS = [path for folder in ("slurm", "launch") for path in (ROOT / folder).iterdir() if path.is_file()]


def test_exit_codes_of_scripts_are_those_of_the_package() -> None:
    codes = {name: code for name, code in vars(exit_codes).items() if name.isupper()}
    given = set()
    for path in SCRIPTS:
        for name, code in re.findall(r"^([A-Z_]+) ?= ?([0-9]+)\b", path.read_text(), re.MULTILINE):
            assert int(code) == codes.get(name, int(code)), f"{path.name}: {name}"
            given.add((path.name, name))
    used = {"BAD_NODES", "CRASHED", "HUNG", "INTERRUPTED", "RUN_ERROR"}
    assert {name for file, name in given if file == "job_log.py"} >= used
    assert given >= {
        ("prologue.sh", "INTERRUPTED"),
        ("prologue.sh", "RUN_ERROR"),
    }


def test_the_documentation_lists_the_exit_codes() -> None:
    documented = re.findall(r"^\| ([0-9]+) \| ", (ROOT / "docs/slurm.md").read_text(), re.MULTILINE)
    known = {code for name, code in vars(exit_codes).items() if name.isupper()}
    assert sorted(map(int, documented)) == sorted(known | {0, job_log.USAGE_ERROR})


def test_scripts_give_no_other_exit_code() -> None:
    literal = {int(code) for path in SCRIPTS for code in re.findall(r"\bexit ([0-9]+)", path.read_text())}
    assert literal == {0, job_log.USAGE_ERROR}


# --- command line -----------------------------------------------------------------------------------------------------


def interpreters() -> list[str]:
    """Every Python from 3.6 on that is found here: pyenv's, the system's and the one of the tests."""
    found = [Path(sys.executable), *Path("~/.pyenv/versions").expanduser().glob("3.[!0-5]*/bin/python3")]
    found += filter(Path.exists, [Path("/usr/bin/python3"), Path("/usr/local/bin/python3")])
    return sorted({os.path.realpath(path) for path in found})


def ask(python: str, *arguments: str) -> list[str]:
    """Call the tool in the poorest locale, without the environment of the tests."""
    done = subprocess.run(
        [python, "-EsSB", TOOL, *arguments], capture_output=True, env={"LC_ALL": "C"}, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    return done.stdout.decode().split("\n")


@pytest.mark.parametrize("python", interpreters(), ids=lambda path: path.strip("/").replace("/", "-"))
def test_the_tool_runs_under_every_python_of_a_batch_host(python: str, tmp_path: Path) -> None:
    log, run = tmp_path / "log", tmp_path / "run ä"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/latest").write_text("step_00000008\n")
    lines = [
        "stage1: running since today",
        "=== attempt 1",
        "0: FAILED (error) DataError: \udcff",
        "0: FAILED größer",
        "",
    ]
    log.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    end = ["decide", "--job", "7", "--log", str(log), f"--unreachable={AWAY}"]
    of_run = [*end, "--phase", "training", "--exit-code", "1", "--run-dir", str(run)]
    assert ask(python, *of_run)[0] == "requeued"
    state, reason, exclude, _ = ask(python, *of_run)
    assert (state, exclude) == ("given_up", "")
    assert reason.startswith("FAILED (error) DataError: ") and "same failure twice" in reason
    assert "(step_00000008)" in reason
    assert len((run / "failures.tsv").read_bytes().splitlines()) == 2
    (run / "bad_nodes.txt").write_text("node2\nnode3\n")
    of_preflight = [*end, "--phase", "preflight", "--exit-code", "3", "--run-dir", str(run)]
    assert ask(python, *of_preflight) == ["requeued", "0: FAILED größer", "node2,node3", ""]
    assert ask(python, *end, "--phase", "task", "--exit-code", "143", "--signal=SIGTERM")[0] == "requeued"
    assert ask(python, "read-status", str(log)) == ["running", ""]


def test_kills_of_a_task_are_counted_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "export: x\n" + "=== to be started again: killed: x\n=== to be started again: interrupted\n" * 2
    )
    end = ["decide", "--job", "7", "--log", str(log), "--phase", "task", "--exit-code", "137"]
    assert ask(sys.executable, *end)[:2] == ["given_up", "exit code 137; 3 failures of this job"]


def test_a_run_whose_failures_cannot_be_counted_is_given_up(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "failures.tsv").mkdir(parents=True)
    end = [
        "decide",
        "--job",
        "7",
        "--log",
        "none",
        "--phase",
        "training",
        "--exit-code",
        "70",
        "--run-dir",
        str(run),
    ]
    state, reason, *_ = ask(sys.executable, *end)
    assert state == "given_up" and f"{run}/failures.tsv cannot be written: Is a directory" in reason


@pytest.mark.parametrize(
    ("first_line", "state"),
    [
        ("stage1: running since 2026-01-01 10:00:00, attempt 2", "running"),
        ("stage1: finished 2026-01-01", "finished"),
        ("stage1: to be started again: x", "requeued"),
        ("stage1: FAILED: x: y", "given_up"),
        ("stage1: stopped by Slurm 2026-01-01", "stopped_by_slurm"),
        (" " * 500, "pending"),
        ("slurmstepd: error: execve(): no such file", "lost"),
    ],
)
def test_the_status_in_a_log(first_line: str, state: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f"{first_line}\n=== attempt 1\n")
    assert ask(sys.executable, "read-status", str(log)) == [state, ""]
    assert ask(sys.executable, "read-status", str(tmp_path / "none")) == ["pending", ""]
