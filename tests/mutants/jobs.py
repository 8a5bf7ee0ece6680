"""Faults of the decision that follows the end of a job."""

from __future__ import annotations

from .mutant import Mutant

POLICY = "slurm/restart_policy.py"
LOG = "slurm/job_log.py"
DECISIONS = ("tests/unit/slurm/test_restart_policy.py",)
CAUSES = ("tests/unit/slurm/test_job_log.py",)

JOBS = [
    Mutant(
        "restart: an interruption counts as a failure", POLICY,
        "return by_stop_signal if first is None else first", "return False if first is None else first", DECISIONS,
    ),
    Mutant(
        "restart: SIGTERM that srun sends counts as an interruption", POLICY,
        "return by_stop_signal if first is None else first", "return by_stop_signal", CAUSES,
    ),
    Mutant(
        "restart: a verdict of preflight is tried again", POLICY,
        'if phase.name == "preflight" and code in (RUN_ERROR, USAGE_ERROR):',
        'if phase.name == "preflight" and code in (RUN_ERROR,):', DECISIONS,
    ),
    Mutant(
        "restart: an unreachable Slurm is the verdict of the program", POLICY,
        "if was_not_started(phase.lines, unreachable):", "if was_not_started([], unreachable):", DECISIONS,
    ),
    Mutant(
        "restart: failures of other jobs count", POLICY,
        "sum(failure.job == newest.job for failure in failures)", "len(failures)", DECISIONS,
    ),
    Mutant(
        "restart: one failure too many", POLICY,
        "if of_job >= limits.failures:", "if of_job > limits.failures:", DECISIONS,
    ),
    Mutant(
        "restart: bad nodes do not give other nodes an attempt", POLICY,
        "excluding=bool(phase.bad_nodes))", "excluding=False)", DECISIONS,
    ),
    Mutant(
        "restart: bad nodes are not excluded", POLICY,
        "reason, phase.bad_nodes, failure)", 'reason, "", failure)', DECISIONS,
    ),
    Mutant(
        "restart: failures at an older checkpoint count", POLICY,
        "if failure.checkpoint == newest.checkpoint else []", "if True else []", DECISIONS,
    ),
    Mutant(
        "restart: the same failure of another rank is another failure", POLICY,
        'return re.sub("[0-9]", "", cause)', "return cause", DECISIONS,
    ),
    Mutant(
        "restart: a failure is not noted", POLICY,
        "if decision.failure and ledger:", "if decision.failure and not ledger:", DECISIONS,
    ),
    Mutant(
        "restart: a job that Slurm has ended is requeued", POLICY,
        "if phase.ended_by_slurm:", "if phase.ended_by_slurm and not phase.lines:", DECISIONS,
    ),
    Mutant(
        "restart: a task that is killed is requeued for ever", POLICY,
        "count = len(history) + 1", "count = 1", DECISIONS,
    ),
    Mutant(
        "restart: an arrow of the drawing is missing in the code", "slurm/job_states.py",
        "    (State.STOPPING, Event.SUCCEEDED): State.FINISHED,\n", "", DECISIONS,
    ),
    Mutant(
        "first cause: a lost peer before its reason", LOG,
        "lost_peer = lost_peer or line", "return line", CAUSES,
    ),
    Mutant(
        "first cause: of an earlier attempt", LOG,
        "return lines[begins[-1] + 1 :] if begins else lines", "return lines", CAUSES,
    ),
    Mutant(
        "first cause: of an earlier phase", LOG, "file.seek(start)", "file.seek(0)", CAUSES,
    ),
    Mutant(
        "first cause: bytes that are not UTF-8 end the policy", LOG,
        'file.read().decode("utf-8", "surrogateescape")', 'file.read().decode("utf-8")', DECISIONS,
    ),
]  # fmt: skip
