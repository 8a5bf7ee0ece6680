"""Rules that attribute a problem to a node, to the run or to nobody. Pure functions on rank 0.

A problem on some nodes is the fault of those nodes; a problem on all nodes is the fault of the run. `nodes` maps every
rank that reported to its node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal

Level = Literal["ok", "warning", "failure"]
SlowLevel = Literal["warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """Outcome of one check, or its outcome for one node."""

    level: Level
    check: str
    """Name of the check."""
    text: str
    """Expected and found values."""
    node: str | None = None
    """Node that the finding concerns; None: all, or unknown."""
    node_fault: bool = False
    """Whether a failure is the fault of a node, known by name or not, and not of the run."""

    def line(self) -> str:
        """Format the finding for the terminal."""
        return f"{self.level:8} {self.check}: {self.node + ': ' if self.node else ''}{self.text}"


def ok(check: str, text: str) -> Finding:
    """Finding of a passed check."""
    return Finding("ok", check, text)


def warning(check: str, text: str, node: str | None = None) -> Finding:
    """Finding that does not prevent the run."""
    return Finding("warning", check, text, node)


def run_failure(check: str, text: str) -> Finding:
    """Finding that the run cannot work on any nodes."""
    return Finding("failure", check, text)


def node_failure(check: str, text: str, node: str | None) -> Finding:
    """Finding of a bad node; None: it is unknown which."""
    return Finding("failure", check, text, node, node_fault=True)


def name_ranks(ranks: Iterable[int]) -> str:
    """Format ranks as `rank 3`, or `ranks 3, 5, ... (8 in all)`."""
    found = sorted(ranks)
    if len(found) == 1:
        return f"rank {found[0]}"
    shown = ", ".join(map(str, found[:6]))
    return f"ranks {shown}" + (f", ... ({len(found)} in all)" if len(found) > 6 else "")


def count(number: int, noun: str) -> str:
    """Format a number with its noun: `1 node`, `2 nodes`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def group_by_node(ranks: Iterable[int], nodes: Mapping[int, str | None]) -> dict[str | None, list[int]]:
    """Group ranks by node, in order of rank."""
    groups: dict[str | None, list[int]] = {}
    for rank in sorted(ranks):
        groups.setdefault(nodes.get(rank), []).append(rank)
    return groups


def missing_ranks(
    world_size: int, nodes: Mapping[int, str], places: Mapping[int, str], seconds: float
) -> list[Finding]:
    """Find the ranks that did not report; `places` is the expected node of each rank, as far as it is known."""
    missing = set(range(world_size)) - nodes.keys()
    return [
        node_failure("ranks", f"{name_ranks(ranks)} did not report within {seconds:.0f} s", node)
        for node, ranks in group_by_node(missing, places).items()
    ]


def attribute_problems(
    check: str, problems: Mapping[int, str], nodes: Mapping[int, str], alone: Literal["run", "node"] = "run"
) -> list[Finding]:
    """Attribute problems of ranks to their nodes, or to the run if every node has one.

    Args:
        check: name of the check.
        problems: description of the problem by rank.
        nodes: node of every rank.
        alone: attribution if there is only one node.
    """
    groups = group_by_node(problems, nodes)
    everywhere = groups.keys() == set(nodes.values())
    if everywhere and (len(groups) > 1 or alone == "run"):
        first = min(problems)
        where = f"all {len(groups)} nodes" if len(groups) > 1 else f"{nodes[first]}"
        return [run_failure(check, f"{problems[first]} (on {where})")]
    return [
        node_failure(check, f"{problems[ranks[0]]} ({name_ranks(ranks)})", node)
        for node, ranks in groups.items()
    ]


def differing_facts(
    check: str, facts: Mapping[int, Mapping[str, str]], nodes: Mapping[int, str]
) -> list[Finding]:
    """Find the nodes whose facts differ from those of most ranks; in a tie rank 0's are expected."""
    findings = []
    for fact in dict.fromkeys(name for found in facts.values() for name in found):
        values = {rank: found.get(fact, "none") for rank, found in facts.items()}
        counts = Counter(values.values())
        most = max(counts.values())
        usual = [value for value in counts if counts[value] == most]
        expected = values[0] if values.get(0) in usual else usual[0]
        odd = {rank: value for rank, value in values.items() if value != expected}
        for node, ranks in group_by_node(odd, nodes).items():
            where = f"{most} of {len(values)} ranks"
            text = f"{fact}: expected {expected} as on {where}, found {odd[ranks[0]]} ({name_ranks(ranks)})"
            findings.append(node_failure(check, text, node))
    return findings


def slow_computation(
    seconds: Mapping[int, float], nodes: Mapping[int, str], factor: float, level: SlowLevel
) -> list[Finding]:
    """Find nodes on which a computation took more than `factor` times the median of all ranks."""
    usual = median(seconds.values())
    slow = {rank for rank, value in seconds.items() if value > factor * usual}
    return [
        Finding(
            level,
            "computation",
            f"{max(seconds[rank] for rank in ranks) * 1e3:.1f} ms, more than {factor:g} times the median "
            f"{usual * 1e3:.1f} ms ({name_ranks(ranks)})",
            node,
            node_fault=True,
        )
        for node, ranks in group_by_node(slow, nodes).items()
    ]


def crowded_gpus(free: Mapping[int, tuple[int, int]], nodes: Mapping[int, str]) -> list[Finding]:
    """Warn of GPU memory in use by other processes; `free` has free and total bytes by rank."""
    limit = 0.9  # the CUDA context of the check itself takes under 1 GB
    crowded = {rank for rank, (left, total) in free.items() if left < limit * total}
    return [
        warning(
            "GPU memory",
            f"{(free[ranks[0]][1] - free[ranks[0]][0]) / 1e9:.1f} of {free[ranks[0]][1] / 1e9:.1f} GB are taken "
            f"by something else ({name_ranks(ranks)})",
            node,
        )
        for node, ranks in group_by_node(crowded, nodes).items()
    ]


def shared_gpus(identities: Mapping[int, str], nodes: Mapping[int, str]) -> list[Finding]:
    """Find ranks that share a GPU, a mistake of the launch that NCCL refuses."""
    users: dict[str, list[int]] = {}
    for rank, identity in sorted(identities.items()):
        users.setdefault(identity, []).append(rank)
    return [
        run_failure("GPUs", f"{name_ranks(ranks)} on {nodes[ranks[0]]} have one GPU, expected one each")
        for ranks in users.values()
        if len(ranks) > 1
    ]


def unshared_directory(
    seen: Mapping[int, Sequence[int]], nodes: Mapping[int, str], directory: str
) -> list[Finding]:
    """Find nodes that do not share the directory with the others.

    Args:
        seen: for every rank that wrote a file to the directory, the ranks whose files it found there.
        nodes: node of every rank.
        directory: for the messages.
    """
    groups = Counter(tuple(sorted(found)) for found in seen.values())
    if not groups or set(groups) == {tuple(sorted(seen))}:
        return []
    check = "run directory"
    if len(set(nodes.values())) > 1 and all(
        nodes[other] == nodes[rank] for rank, found in seen.items() for other in found
    ):
        return [run_failure(check, f"{directory} is not shared: every node sees its own files only")]
    most = max(groups.values())
    usual = max((group for group, count in groups.items() if count == most), key=lambda group: 0 in group)
    apart = {rank for rank, found in seen.items() if tuple(sorted(found)) != usual}
    # If the other ranks do not see a rank's file, that rank's node is at fault, not theirs.
    unseen = {rank for rank in apart if rank not in usual}
    return [
        node_failure(
            check,
            f"{directory} is not shared with the other nodes: expected the files of {len(seen)} ranks, found those of "
            f"{name_ranks(seen[ranks[0]]) if seen[ranks[0]] else 'none'} ({name_ranks(ranks)})",
            node,
        )
        for node, ranks in group_by_node(unseen or apart, nodes).items()
    ]


def missing_paths(missing: Mapping[int, Sequence[str]], nodes: Mapping[int, str]) -> list[Finding]:
    """Find nodes that lack a path which others have. The checks of data and weights report paths that no node has."""
    findings = []
    for path in dict.fromkeys(path for paths in missing.values() for path in paths):
        without = {rank for rank, paths in missing.items() if path in paths}
        groups = group_by_node(without, nodes)
        if groups.keys() == set(nodes.values()):
            continue
        findings += [
            node_failure("shared files", f"{path} is not there, but is on other nodes", node)
            for node in groups
        ]
    return findings


def free_space(free: int, checkpoint_bytes: int, wanted: int, directory: str) -> Finding:
    """Check that the next checkpoints fit into the file system.

    Args:
        free: free bytes of the file system, without regard to quotas.
        checkpoint_bytes: size of one checkpoint.
        wanted: checkpoints that the run will write before it removes one; at least 1.
        directory: for the message.
    """
    found = f"{free / 1e9:.1f} GB free in {directory}"
    one = f"a checkpoint takes {checkpoint_bytes / 1e9:.2f} GB"
    if free < checkpoint_bytes:
        return run_failure("space", f"{found}, but {one}")
    if free < wanted * checkpoint_bytes:
        return warning("space", f"{found}: {one}, and {wanted} come before the first is removed")
    return ok("space", f"{found}; {one}, {wanted} before the first is removed")


def link_rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Arrange the links of a ring of nodes in rounds, such that no node has two links in a round."""
    links = list(pairwise(nodes))
    closing = [(nodes[-1], nodes[0])] if len(nodes) > 2 else []
    return [links for links in (links[::2], links[1::2], closing) if links]


def slow_links(
    bandwidths: Mapping[tuple[str, str], float], factor: float, level: SlowLevel, check: str = "links"
) -> list[Finding]:
    """Find nodes all of whose links are slow.

    A slow node slows both of its links, and thereby one link of each neighbour; so the fastest link of a node is
    compared with the median of the nodes. With two nodes the slow one cannot be identified.

    Args:
        bandwidths: bytes per second by link.
        factor: ratio to the median beyond which a node is slow.
        level: level of the finding.
        check: name of the check.
    """
    best: dict[str, float] = {}
    for link, bandwidth in bandwidths.items():
        for node in link:
            best[node] = max(best.get(node, 0.0), bandwidth)
    if not best:
        return []
    usual = median(best.values())
    return [
        Finding(
            level,
            check,
            f"{value / 1e9:.2f} GB/s on its fastest link, more than {factor:g} times slower than the median "
            f"{usual / 1e9:.2f} GB/s",
            node,
            node_fault=True,
        )
        for node, value in best.items()
        if value * factor < usual
    ]


def first_failed_ranks(
    check: str, reached: Mapping[int, int], errors: Mapping[int, str], nodes: Mapping[int, str]
) -> list[Finding]:
    """Find the ranks that failed first in a collective operation.

    A failure spreads to the other ranks, but later: the ranks that failed in the earliest phase are at fault. If they
    are on every node, none is named.

    Args:
        check: name of the check.
        reached: number of the phase in which each rank failed.
        errors: error of each failed rank.
        nodes: node of every rank, also of those that did not fail.
    """
    if not errors:
        return []
    earliest = min(reached[rank] for rank in errors)
    suspects = [rank for rank in errors if reached[rank] == earliest]
    if len(group_by_node(suspects, nodes)) == len(set(nodes.values())) > 1:
        return [node_failure(check, f"{errors[suspects[0]]} (on every node)", None)]
    return [
        node_failure(check, f"{errors[ranks[0]]} ({name_ranks(ranks)})", node)
        for node, ranks in group_by_node(suspects, nodes).items()
    ]
