"""The states of a Slurm job and the events that lead from one to another (used by restart_policy.py).

docs/job_states.svg is generated from them. Python 3.6 or newer, standard library only.
"""

from enum import Enum
from typing import Dict, Tuple


class State(Enum):
    """State of a job. The values are the names in the drawing."""

    PENDING = "pending"
    PREFLIGHT = "preflight"
    RUNNING = "running"
    STOPPING = "stopping"
    FAILED = "failed"
    REQUEUED = "requeued"
    FINISHED = "finished"
    GIVEN_UP = "given_up"
    STOPPED = "stopped_by_slurm"
    LOST = "lost"


class Event(Enum):
    """Event in the life of a job. The values are the labels in the drawing."""

    STARTED = "started by Slurm"
    PASSED = "checks passed"
    SUCCEEDED = "work done"
    SIGNALLED = "SIGTERM or SIGUSR1"
    ENDED = "all processes saved or ended"
    UNREACHABLE = "Slurm unreachable"
    REJECTED = "arguments or input rejected"
    BAD_NODES = "bad nodes"
    CRASHED = "crashed, killed or hung"
    BELOW_LIMITS = "limits not reached"
    LIMIT_REACHED = "limit reached"
    ENDED_BY_SLURM = "cancelled, requeued or out of time"
    REQUEUE_ACCEPTED = "scontrol requeue accepted"
    REQUEUE_REFUSED = "scontrol requeue refused"
    SHELL_KILLED = "batch shell killed"


ACTIVE = (State.PREFLIGHT, State.RUNNING, State.STOPPING)
TRANSITIONS: Dict[Tuple[State, Event], State] = {
    (State.PENDING, Event.STARTED): State.PREFLIGHT,
    (State.PREFLIGHT, Event.PASSED): State.RUNNING,
    (State.RUNNING, Event.SUCCEEDED): State.FINISHED,
    (State.PREFLIGHT, Event.SIGNALLED): State.STOPPING,
    (State.RUNNING, Event.SIGNALLED): State.STOPPING,
    (State.STOPPING, Event.ENDED): State.REQUEUED,
    (State.STOPPING, Event.SUCCEEDED): State.FINISHED,
    (State.PREFLIGHT, Event.BAD_NODES): State.FAILED,
    (State.STOPPING, Event.BAD_NODES): State.FAILED,
    **{(state, Event.CRASHED): State.FAILED for state in ACTIVE},
    **{(state, Event.REJECTED): State.GIVEN_UP for state in ACTIVE},
    **{(state, Event.UNREACHABLE): State.REQUEUED for state in ACTIVE},
    **{(state, Event.ENDED_BY_SLURM): State.STOPPED for state in ACTIVE},
    (State.FAILED, Event.BELOW_LIMITS): State.REQUEUED,
    (State.FAILED, Event.LIMIT_REACHED): State.GIVEN_UP,
    (State.REQUEUED, Event.REQUEUE_ACCEPTED): State.PENDING,
    (State.REQUEUED, Event.REQUEUE_REFUSED): State.GIVEN_UP,
    **{(state, Event.SHELL_KILLED): State.LOST for state in (*ACTIVE, State.REQUEUED)},
}
"""State after an event. A state that no event leaves is an end of the job."""
