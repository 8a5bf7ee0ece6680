"""A finding of the checks before a run, the exit code and the bad nodes that follow, and how ranks are named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_qwenvl.runtime.exit_codes import BAD_NODES, RUN_ERROR, SUCCESS

Level = Literal["ok", "warning", "failure"]
Slow = Literal["warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check, or its outcome for one node."""

    level: Level
    check: str
    """What was checked, in a word or two."""
    text: str
    """What was expected and what was found."""
    node: str | None = None
    """The node it is about."""
    of_nodes: bool = False
    """Whether a failure is the fault of nodes, known by name or not, and not of the run."""

    def line(self) -> str:
        """For the screen."""
        return f"{self.level:8} {self.check}: {self.node + ': ' if self.node else ''}{self.text}"


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding("ok", check, text)


def warning(check: str, text: str, node: str | None = None) -> Finding:
    """Worth knowing; the run can work."""
    return Finding("warning", check, text, node)


def run_failure(check: str, text: str) -> Finding:
    """The run cannot work, on whatever nodes."""
    return Finding("failure", check, text)


def node_failure(check: str, text: str, node: str | None) -> Finding:
    """A node is bad; None: which one is not known."""
    return Finding("failure", check, text, node, of_nodes=True)


def exit_code(findings: Iterable[Finding]) -> int:
    """Bad nodes come first: what else fails may fail because of them."""
    failures = [finding for finding in findings if finding.level == "failure"]
    if any(finding.of_nodes for finding in failures):
        return BAD_NODES
    return RUN_ERROR if failures else SUCCESS


def bad_nodes(findings: Iterable[Finding]) -> list[str]:
    """Names of the nodes that failed, sorted."""
    return sorted(
        {finding.node for finding in findings if finding.level == "failure" and finding.node is not None}
    )


def name_ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 3, 5, ... (8 in all)`."""
    found = sorted(ranks)
    if len(found) == 1:
        return f"rank {found[0]}"
    shown = ", ".join(map(str, found[:6]))
    return f"ranks {shown}" + (f", ... ({len(found)} in all)" if len(found) > 6 else "")


def count(number: int, what: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def by_node(ranks: Iterable[int], nodes: Mapping[int, str | None]) -> dict[str | None, list[int]]:
    """Ranks of every node, in order of rank."""
    groups: dict[str | None, list[int]] = {}
    for rank in sorted(ranks):
        groups.setdefault(nodes.get(rank), []).append(rank)
    return groups
