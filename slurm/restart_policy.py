"""Decide what follows when a phase of a Slurm job did not succeed: requeue the job, or give up.

    python3 slurm/restart_policy.py decide --phase training --exit-code 143 --job 7 --log LOG --run-dir RUN
    python3 slurm/restart_policy.py read-status LOG

slurm/prologue.sh calls this on the batch host, outside of any container or environment. It therefore needs only the
standard library of Python 3.6 or newer, and no part of the package. The pure functions `classify` and `decide` move
through the state machine of job_states.py; `main` reads and writes files.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence

from job_failures import (
    KILLED,
    NO_CHECKPOINT,
    STARTED_AGAIN,
    Failure,
    newest_checkpoint,
    read_failures,
    read_kills,
    record,
)
from job_log import (
    BAD_NODES,
    BY_SIGTERM,
    BY_SIGUSR1,
    FIRST_SIGNAL,
    INTERRUPTED,
    RUN_ERROR,
    USAGE_ERROR,
    encode,
    first_cause,
    first_line,
    first_rank_was_interrupted,
    last_message,
    one_line,
    read_lines,
    read_phase_log,
    was_not_started,
)
from job_states import TRANSITIONS, Event, State

PHASES = ("configuration", "preflight", "training", "task")
"""Pieces of a job; `task` is the work of a job that does not train."""


class Phase(NamedTuple):
    """A phase that did not succeed.

    Attributes:
        name: one of `PHASES`.
        exit_code: of the launcher; for srun the highest of all tasks.
        signal: name of the first signal that the batch shell received, or nothing.
        lines: the log since the phase began.
        checkpoint: newest checkpoint of a training run; None where no run directory is known.
        bad_nodes: nodes that preflight found to be bad, separated by commas.
        ended_by_slurm: whether Slurm says that the job is cancelled, requeued or out of time.
    """

    name: str
    exit_code: int
    signal: str
    lines: List[str]
    checkpoint: Optional[str]
    bad_nodes: str
    ended_by_slurm: bool


class RestartLimits(NamedTuple):
    """Limits at which a job gives up: failures of one job, and failures without a new checkpoint in between."""

    failures: int
    without_progress: int


class Decision(NamedTuple):
    """Consequence of an event: `state` is REQUEUED, GIVEN_UP or STOPPED; `failure` is to be noted in failures.tsv."""

    state: State
    reason: str
    exclude: str = ""
    failure: Optional[Failure] = None


# --- decisions ------------------------------------------------------------------------------------------------------


def classify(phase: Phase, unreachable: str) -> Event:
    """Name what ended a phase."""
    code, training = phase.exit_code, phase.checkpoint is not None
    if (phase.name, code) == ("training", INTERRUPTED) or was_interrupted(phase):
        return Event.SIGNALLED
    if was_not_started(phase.lines, unreachable):
        return Event.UNREACHABLE
    if not training:
        return Event.CRASHED if code >= FIRST_SIGNAL else Event.REJECTED
    if phase.name == "preflight" and code in (RUN_ERROR, USAGE_ERROR):
        return Event.REJECTED
    if phase.name == "preflight" and code == BAD_NODES:
        return Event.BAD_NODES
    return Event.CRASHED


def was_interrupted(phase: Phase) -> bool:
    """Whether the processes ended because of a stop signal from outside."""
    by_stop_signal = phase.exit_code in (INTERRUPTED, BY_SIGUSR1, BY_SIGTERM)
    if by_stop_signal and phase.signal:
        return True
    first = first_rank_was_interrupted(phase.lines)
    return by_stop_signal if first is None else first


def explain(event: Event, phase: Phase) -> str:
    """Describe the end of a phase in one line."""
    nothing_saved = phase.checkpoint == NO_CHECKPOINT
    if event is Event.UNREACHABLE:
        return f"Slurm could not be reached during {phase.name}"
    if event in (Event.REJECTED, Event.BAD_NODES):
        return last_message(phase.lines, phase.exit_code)
    if event is Event.CRASHED:
        return first_cause(phase.lines, phase.exit_code)
    if (phase.name, phase.exit_code) == ("training", INTERRUPTED):
        return "interrupted, " + ("nothing saved yet" if nothing_saved else f"saved as {phase.checkpoint}")
    by = f" by {phase.signal}" if phase.signal else ""
    newest = "no checkpoint yet" if nothing_saved else f"newest checkpoint: {phase.checkpoint}"
    return f"interrupted{by} during {phase.name}" + ("" if phase.checkpoint is None else f", {newest}")


def limit_reached(history: Sequence[Failure], newest: Failure, limits: RestartLimits, excluding: bool) -> str:
    """Name the limit that a failure of a training run reaches, or nothing.

    Args:
        history: the failures before, of all jobs of this run, oldest first.
        newest: the failure that is judged.
        limits: of failures.
        excluding: whether the next attempt runs on other nodes; then only the limit of all failures holds.
    """
    failures = [*history, newest]
    of_job = sum(failure.job == newest.job for failure in failures)
    if of_job >= limits.failures:
        return f"{of_job} failures of this job"
    if excluding:
        return ""
    here: List[str] = []
    for failure in failures:
        here = [*here, failure.cause] if failure.checkpoint == newest.checkpoint else []
    # Another rank, port or node may report the same failure.
    if sum(_without_digits(cause) == _without_digits(newest.cause) for cause in here) >= 2:
        before_first = newest.checkpoint == NO_CHECKPOINT
        place = (
            "before the first checkpoint"
            if before_first
            else f"from the same checkpoint ({newest.checkpoint})"
        )
        return f"the same failure twice {place}"
    if len(here) >= limits.without_progress:
        return f"{len(here)} failures without a new checkpoint"
    return ""


def _without_digits(cause: str) -> str:
    return re.sub("[0-9]", "", cause)


def decide(
    phase: Phase, job: str, history: Sequence[Failure], limits: RestartLimits, unreachable: str
) -> Decision:
    """Decide what follows a phase that did not succeed.

    Args:
        phase: what ended, and how.
        job: Slurm's number of the job.
        history: earlier failures of the run or, without a run directory, of the job; oldest first.
        limits: of failures.
        unreachable: regular expression, see `was_not_started`.
    """
    event = classify(phase, unreachable)
    reason = one_line(explain(event, phase))
    state = State.PREFLIGHT if phase.name in ("configuration", "preflight") else State.RUNNING
    if phase.signal or event is Event.SIGNALLED:
        state = TRANSITIONS[state, Event.SIGNALLED]
    if phase.ended_by_slurm:
        return Decision(TRANSITIONS[state, Event.ENDED_BY_SLURM], reason)
    state = TRANSITIONS[state, Event.ENDED if event is Event.SIGNALLED else event]
    if state is not State.FAILED:
        return Decision(state, reason)
    if phase.checkpoint is None:
        return decide_on_task(reason, history, limits)
    failure = Failure(job, phase.checkpoint, reason)
    limit = limit_reached(history, failure, limits, excluding=bool(phase.bad_nodes))
    if limit:
        return Decision(TRANSITIONS[state, Event.LIMIT_REACHED], reason + "; " + limit, failure=failure)
    return Decision(TRANSITIONS[state, Event.BELOW_LIMITS], reason, phase.bad_nodes, failure)


def decide_on_task(reason: str, history: Sequence[Failure], limits: RestartLimits) -> Decision:
    """Decide what follows when a task, or the question for the configuration, was killed: a few more attempts."""
    count = len(history) + 1
    if count < limits.without_progress:
        return Decision(TRANSITIONS[State.FAILED, Event.BELOW_LIMITS], KILLED + reason)
    return Decision(TRANSITIONS[State.FAILED, Event.LIMIT_REACHED], f"{reason}; {count} failures of this job")


# --- files ----------------------------------------------------------------------------------------------------------

STATUSES = {
    "running since ": State.RUNNING,
    "finished": State.FINISHED,
    STARTED_AGAIN: State.REQUEUED,
    "FAILED: ": State.GIVEN_UP,
    "stopped by Slurm": State.STOPPED,
}
"""Beginnings of the first line of a job's log, after the job's name."""


def read_status(path: Path) -> State:
    """Read the state that the first line of a job's log names: PENDING before there is one, LOST if it names none."""
    line = first_line(path)
    status = line.partition(": ")[2]
    if not line:
        return State.PENDING
    return next((state for start, state in STATUSES.items() if status.startswith(start)), State.LOST)


# --- command line ---------------------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command")
    commands.required = True
    status = commands.add_parser("read-status", help="print the state that a log's first line names")
    status.add_argument("log", type=Path)
    add = commands.add_parser(
        "decide", help="print the next state, its reason and the nodes to exclude"
    ).add_argument
    add("--phase", choices=PHASES, required=True)
    add("--exit-code", type=int, required=True)
    add("--signal", default="", help="the first signal that the batch shell received")
    add("--ended-by-slurm", action="store_true", help="Slurm says that the job does not run any more")
    add("--job", required=True, help="Slurm's number of the job")
    add("--log", type=Path, required=True)
    add("--log-start", type=int, default=0, help="byte of the log at which the phase began")
    add("--run-dir", type=Path, help="of a training run")
    add("--unreachable", default="", help="regular expression of messages that Slurm cannot be reached")
    add("--max-failures", type=int, default=10)
    add("--max-failures-without-progress", type=int, default=3)
    return parser.parse_args(argv)


def decide_and_record(arguments: argparse.Namespace) -> Decision:
    """Decide with the log and the run directory, and note a failure there."""
    run_dir: Optional[Path] = arguments.run_dir
    nodes = ""
    if run_dir and (arguments.phase, arguments.exit_code) == ("preflight", BAD_NODES):
        nodes = ",".join(line for line in read_lines(run_dir / "bad_nodes.txt") if line)
    phase = Phase(
        name=arguments.phase,
        exit_code=arguments.exit_code,
        signal=arguments.signal,
        lines=read_phase_log(arguments.log, arguments.log_start),
        checkpoint=newest_checkpoint(run_dir) if run_dir else None,
        bad_nodes=nodes,
        ended_by_slurm=arguments.ended_by_slurm,
    )
    ledger = run_dir / "failures.tsv" if run_dir else None
    history = read_failures(ledger) if ledger else read_kills(arguments.log, arguments.job)
    limits = RestartLimits(arguments.max_failures, arguments.max_failures_without_progress)
    decision = decide(phase, arguments.job, history, limits, arguments.unreachable)
    if decision.failure and ledger:
        try:
            record(decision.failure, ledger)
        except OSError as error:  # failures could not be counted
            return Decision(
                State.GIVEN_UP, f"{decision.reason}; and {ledger} cannot be written: {error.strerror}"
            )
    return decision


def main(argv: Sequence[str]) -> int:
    """Print the answer: a state, or a decision as three lines."""
    arguments = parse_arguments(argv)
    if arguments.command == "read-status":
        print(read_status(arguments.log).value)
        return 0
    decision = decide_and_record(arguments)
    text = "\n".join((decision.state.value, decision.reason, decision.exclude)) + "\n"
    sys.stdout.buffer.write(encode(text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
