"""Node of a rank that has not reported, inferred from its neighbours and from Slurm's list of nodes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_qwenvl.runtime.processes import ProcessInfo, expand_counts

_SCONTROL_SECONDS = 10


@dataclass(frozen=True)
class RankPlacement:
    """Node and local rank of a rank that reported."""

    node: str
    local_rank: int
    local_world_size: int


def place_ranks(process: ProcessInfo, placements: Mapping[int, RankPlacement]) -> dict[int, str]:
    """Infer the node of every rank, as far as possible.

    Ranks are assumed to be numbered node by node, the default of launchers. If a rank that reported contradicts that,
    nothing is inferred for the others.

    Args:
        process: gives launcher and world size.
        placements: placement of each rank that reported.
    """
    known = {rank: placement.node for rank, placement in placements.items()}
    for places in (neighbour_nodes(placements), slurm_nodes(process)):
        if all(places.get(rank, node) == node for rank, node in known.items()):
            known = {**places, **known}
    return {rank: node for rank, node in known.items() if rank < process.world_size}


def neighbour_nodes(placements: Mapping[int, RankPlacement]) -> dict[int, str]:
    """Nodes of the ranks that share a node with one that reported; empty if the placements are contradictory."""
    places: dict[int, str] = {}
    for rank, placement in placements.items():
        first = rank - placement.local_rank
        for other in range(first, first + placement.local_world_size):
            if places.setdefault(other, placement.node) != placement.node:
                return {}
    return places


def slurm_nodes(process: ProcessInfo, env: Mapping[str, str] | None = None) -> dict[int, str]:
    """Nodes of all ranks in block order inside a Slurm allocation; empty outside or if they cannot be determined."""
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
    """Expand `node[1-2]` to node1 and node2; empty without scontrol."""
    command = ["scontrol", "show", "hostnames", listed]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_SCONTROL_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return result.stdout.split()
