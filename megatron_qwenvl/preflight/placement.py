"""On which node a rank should be that has not reported: from its neighbours, and from Slurm's list of nodes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_qwenvl.runtime.processes import ProcessInfo, expand_counts

_SCONTROL_SECONDS = 10


@dataclass(frozen=True)
class Seat:
    """Where a rank that reported is."""

    node: str
    local_rank: int
    local_world_size: int


def place_ranks(process: ProcessInfo, seats: Mapping[int, Seat]) -> dict[int, str]:
    """The node of every rank, as far as it is known.

    Ranks are taken to be numbered node by node, as launchers do unless told otherwise. Where a rank that reported
    contradicts that, nothing is said of those that did not.

    Args:
        process: the place of this process, for the launcher and the size of the run.
        seats: where the ranks are that reported.
    """
    known = {rank: seat.node for rank, seat in seats.items()}
    for places in (beside(seats), slurm_places(process)):
        if all(places.get(rank, node) == node for rank, node in known.items()):
            known = {**places, **known}
    return {rank: node for rank, node in known.items() if rank < process.world_size}


def beside(seats: Mapping[int, Seat]) -> dict[int, str]:
    """Nodes of the ranks that share a node with one that reported; empty if the seats contradict each other."""
    places: dict[int, str] = {}
    for rank, seat in seats.items():
        first = rank - seat.local_rank
        for other in range(first, first + seat.local_world_size):
            if places.setdefault(other, seat.node) != seat.node:
                return {}
    return places


def slurm_places(process: ProcessInfo, env: Mapping[str, str] | None = None) -> dict[int, str]:
    """Nodes of all ranks in block order inside a Slurm allocation; empty outside or where it cannot be known."""
    env = os.environ if env is None else env
    step = process.launcher == "slurm" and "SLURM_STEP_NODELIST" in env
    listed = env.get("SLURM_STEP_NODELIST" if step else "SLURM_JOB_NODELIST")
    nodes = _host_names(listed) if listed else []
    if process.launcher == "slurm":
        per_node = env.get("SLURM_STEP_TASKS_PER_NODE" if step else "SLURM_TASKS_PER_NODE", "")
        counts = expand_counts(per_node)
    else:
        counts = [process.local_world_size] * len(nodes)
    if len(counts) != len(nodes) or sum(counts) != process.world_size:
        return {}
    names = [node for node, count in zip(nodes, counts, strict=True) for _ in range(count)]
    return dict(enumerate(names))


def _host_names(listed: str) -> Sequence[str]:
    """`node[1-2]` is node1 and node2; empty without scontrol."""
    command = ["scontrol", "show", "hostnames", listed]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_SCONTROL_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return result.stdout.split()
