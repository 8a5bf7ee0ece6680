"""Rules that decide whose fault a problem is: a node's, the run's, or nobody's.

Pure functions on rank 0. `nodes` maps every rank that reported to its node. What is wrong on some nodes is those nodes'
fault; what is wrong on all of them is the run's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Literal

from .findings import Finding, Slow, by_node, name_ranks, node_failure, ok, run_failure, warning


def missing_ranks(
    world_size: int, nodes: Mapping[int, str], places: Mapping[int, str], seconds: float
) -> list[Finding]:
    """Names the ranks that did not report; `places` is where ranks should be, as far as that is known."""
    missing = set(range(world_size)) - nodes.keys()
    return [
        node_failure("ranks", f"{name_ranks(ranks)} did not report within {seconds:.0f} s", node)
        for node, ranks in by_node(missing, places).items()
    ]


def spread(
    check: str, problems: Mapping[int, str], nodes: Mapping[int, str], alone: Literal["run", "node"] = "run"
) -> list[Finding]:
    """Problems of ranks: the nodes' fault, or the run's if every node has one.

    Args:
        check: name of the check.
        problems: what is wrong, by rank.
        nodes: node of every rank.
        alone: whose fault it is where there is one node only.
    """
    groups = by_node(problems, nodes)
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
    """Names the nodes whose facts differ from what most ranks have; in a tie rank 0's are expected."""
    findings = []
    for fact in dict.fromkeys(name for found in facts.values() for name in found):
        values = {rank: found.get(fact, "none") for rank, found in facts.items()}
        counts = Counter(values.values())
        most = max(counts.values())
        usual = [value for value in counts if counts[value] == most]
        expected = values[0] if values.get(0) in usual else usual[0]
        odd = {rank: value for rank, value in values.items() if value != expected}
        for node, ranks in by_node(odd, nodes).items():
            where = f"{most} of {len(values)} ranks"
            text = f"{fact}: expected {expected} as on {where}, found {odd[ranks[0]]} ({name_ranks(ranks)})"
            findings.append(node_failure(check, text, node))
    return findings


def slow_computation(
    seconds: Mapping[int, float], nodes: Mapping[int, str], factor: float, level: Slow
) -> list[Finding]:
    """Names nodes on which a computation took more than `factor` times the median of all ranks."""
    usual = median(seconds.values())
    slow = {rank for rank, value in seconds.items() if value > factor * usual}
    return [
        Finding(
            level,
            "computation",
            f"{max(seconds[rank] for rank in ranks) * 1e3:.1f} ms, more than {factor:g} times the median "
            f"{usual * 1e3:.1f} ms ({name_ranks(ranks)})",
            node,
            of_nodes=True,
        )
        for node, ranks in by_node(slow, nodes).items()
    ]


def crowded_gpus(free: Mapping[int, tuple[int, int]], nodes: Mapping[int, str]) -> list[Finding]:
    """Warns where something else occupies GPU memory; `free` has free and all bytes by rank."""
    limit = 0.9  # the CUDA context of the check itself takes under 1 GB
    crowded = {rank for rank, (left, total) in free.items() if left < limit * total}
    return [
        warning(
            "GPU memory",
            f"{(free[ranks[0]][1] - free[ranks[0]][0]) / 1e9:.1f} of {free[ranks[0]][1] / 1e9:.1f} GB are taken "
            f"by something else ({name_ranks(ranks)})",
            node,
        )
        for node, ranks in by_node(crowded, nodes).items()
    ]


def shared_gpus(identities: Mapping[int, str], nodes: Mapping[int, str]) -> list[Finding]:
    """Two ranks on one GPU: a mistake of the launch; NCCL refuses it."""
    users: dict[str, list[int]] = {}
    for rank, identity in sorted(identities.items()):
        users.setdefault(identity, []).append(rank)
    return [
        run_failure("GPUs", f"{name_ranks(ranks)} on {nodes[ranks[0]]} have one GPU, expected one each")
        for ranks in users.values()
        if len(ranks) > 1
    ]


def not_shared(seen: Mapping[int, Sequence[int]], nodes: Mapping[int, str], directory: str) -> list[Finding]:
    """Finds nodes that do not share the directory with the others.

    Args:
        seen: for every rank that wrote a file into the directory, the ranks whose files it found there.
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
    # Where the others do not see a rank's file, it is that rank's node which is apart, not theirs.
    unseen = {rank for rank in apart if rank not in usual}
    return [
        node_failure(
            check,
            f"{directory} is not shared with the other nodes: expected the files of {len(seen)} ranks, found those of "
            f"{name_ranks(seen[ranks[0]]) if seen[ranks[0]] else 'none'} ({name_ranks(ranks)})",
            node,
        )
        for node, ranks in by_node(unseen or apart, nodes).items()
    ]


def unseen_paths(missing: Mapping[int, Sequence[str]], nodes: Mapping[int, str]) -> list[Finding]:
    """Names nodes that lack a path which others have. A path that no node has is for the caller to explain."""
    findings = []
    for path in dict.fromkeys(path for paths in missing.values() for path in paths):
        without = {rank for rank, paths in missing.items() if path in paths}
        groups = by_node(without, nodes)
        if groups.keys() == set(nodes.values()):
            continue
        findings += [
            node_failure("shared files", f"{path} is not there, but is on other nodes", node)
            for node in groups
        ]
    return findings


def free_space(free: int, checkpoint_bytes: int, wanted: int, directory: str) -> Finding:
    """Whether the next checkpoints fit.

    Args:
        free: free bytes of the file system; quotas are not known.
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
    """The links of a ring of nodes in rounds, such that no node has two links in a round."""
    links = list(pairwise(nodes))
    closing = [(nodes[-1], nodes[0])] if len(nodes) > 2 else []
    return [links for links in (links[::2], links[1::2], closing) if links]


def slow_links(
    bandwidths: Mapping[tuple[str, str], float], factor: float, level: Slow, check: str = "links"
) -> list[Finding]:
    """Names nodes all of whose links are slow.

    A slow node slows both of its links, and with them a link of each neighbour; so a node counts as fast as its
    fastest link, and is compared with the median of the nodes. Between two nodes nothing can be told.

    Args:
        bandwidths: bytes per second by link.
        factor: how many times slower than the median is slow.
        level: what a slow node is.
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
            of_nodes=True,
        )
        for node, value in best.items()
        if value * factor < usual
    ]


def stuck_ranks(
    check: str, reached: Mapping[int, int], errors: Mapping[int, str], nodes: Mapping[int, str]
) -> list[Finding]:
    """Who held up what all ranks do together.

    Ranks that are not to blame fail too, but later: those that failed at the earliest stage are named. If that is
    all of them, nobody can be.

    Args:
        check: name of the check.
        reached: number of the stage that every failed rank was in.
        errors: what happened to it.
        nodes: node of every rank, also of those that did not fail.
    """
    if not errors:
        return []
    earliest = min(reached[rank] for rank in errors)
    suspects = [rank for rank in errors if reached[rank] == earliest]
    if len(by_node(suspects, nodes)) == len(set(nodes.values())) > 1:
        return [node_failure(check, f"{errors[suspects[0]]} (on every node)", None)]
    return [
        node_failure(check, f"{errors[ranks[0]]} ({name_ranks(ranks)})", node)
        for node, ranks in by_node(suspects, nodes).items()
    ]
