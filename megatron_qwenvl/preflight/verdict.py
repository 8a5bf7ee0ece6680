"""Verdict of the checks: reports of all ranks to findings, exit code and bad nodes. Pure functions on rank 0.

`nodes` maps every rank to its node. A node is slow if it takes more than `factor` times the median; `slow` is the level
of that finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_qwenvl.runtime.exit_codes import BAD_NODES, RUN_ERROR, SUCCESS

from . import rules
from .probes import MESSAGE_BYTES, DirectoryReport, MachineReport, NetworkReport
from .rules import Finding, SlowLevel, count, group_by_node, name_ranks, node_failure, ok

Nodes = Mapping[int, str]


@dataclass(frozen=True)
class Verdict:
    """Result of the checks, the same on all ranks."""

    code: int
    """0: passed, 1: the run cannot work, 3: nodes are bad."""
    findings: tuple[Finding, ...]
    """All findings, on rank 0; empty on the others."""


def exit_code(findings: Iterable[Finding]) -> int:
    """Exit code of the checks. Bad nodes take precedence, because they may cause the other failures."""
    failures = [finding for finding in findings if finding.level == "failure"]
    if any(finding.node_fault for finding in failures):
        return BAD_NODES
    return RUN_ERROR if failures else SUCCESS


def bad_nodes(findings: Iterable[Finding]) -> list[str]:
    """Names of the nodes that failed, sorted."""
    return sorted(
        {finding.node for finding in findings if finding.level == "failure" and finding.node is not None}
    )


def assess_versions(facts: Mapping[int, Mapping[str, str]], nodes: Nodes) -> list[Finding]:
    """Compare the versions of all ranks."""
    common = (f"{name} {value}" for name, value in facts[0].items() if value not in ("None", "none"))
    return rules.differing_facts("versions", facts, nodes) or [ok("versions", f"equal: {', '.join(common)}")]


def unresponsive_ranks(check: str, answered: Sequence[int], seconds: float, nodes: Nodes) -> list[Finding]:
    """Find ranks that had reported before and have stopped or hang."""
    return [
        node_failure(check, f"{name_ranks(ranks)} stopped or hangs: no answer within {seconds:.0f} s", node)
        for node, ranks in group_by_node(nodes.keys() - set(answered), nodes).items()
    ]


def can_form_group(machines: Mapping[int, MachineReport]) -> bool:
    """Return whether all ranks have a working device of one kind, so that a process group of all can be tried."""
    broken = any(machine.device_problem or machine.compute_problem for machine in machines.values())
    return not broken and len({machine.device for machine in machines.values()}) == 1


def assess_machines(
    machines: Mapping[int, MachineReport], nodes: Nodes, factor: float, slow: SlowLevel
) -> list[Finding]:
    """Assess device, kernels and computation of all ranks."""
    broken = {rank: machine.device_problem for rank, machine in machines.items() if machine.device_problem}
    working = {rank: machine for rank, machine in machines.items() if rank not in broken}
    findings = rules.attribute_problems("device", broken, nodes, alone="node")
    if not working:
        return findings
    return [
        *findings,
        *_assess_devices(working, nodes, everywhere=not broken),
        *_assess_kernels(working, nodes),
        *_assess_computation(working, nodes, factor, slow),
    ]


def _assess_devices(machines: Mapping[int, MachineReport], nodes: Nodes, everywhere: bool) -> list[Finding]:
    facts = {rank: {"kind": m.device, "GPU": m.gpu or "none"} for rank, m in machines.items()}
    gpus = {rank: machine for rank, machine in machines.items() if machine.gpu}
    free = {rank: (gpu.free_bytes, gpu.total_bytes) for rank, gpu in gpus.items()}
    identities = {rank: f"{nodes[rank]} {gpu.gpu_identity}" for rank, gpu in gpus.items()}
    findings = [
        *rules.differing_facts("device", facts, nodes),
        *rules.shared_gpus(identities, nodes),
        *rules.crowded_gpus(free, nodes),
    ]
    first = machines[min(machines)]
    return findings or ([ok("device", f"{first.gpu or 'CPU'} on every rank")] if everywhere else [])


def _assess_kernels(machines: Mapping[int, MachineReport], nodes: Nodes) -> list[Finding]:
    unusable = {rank: machine.kernel_problem for rank, machine in machines.items() if machine.kernel_problem}
    chosen = {rank: {"kernels": machine.kernels} for rank, machine in machines.items() if machine.kernels}
    findings = [
        *rules.attribute_problems("kernels", unusable, nodes),
        *rules.differing_facts("kernels", chosen, nodes),
    ]
    return findings or [ok("kernels", machines[min(machines)].kernels)]


def _assess_computation(
    machines: Mapping[int, MachineReport], nodes: Nodes, factor: float, slow: SlowLevel
) -> list[Finding]:
    failed = {rank: machine.compute_problem for rank, machine in machines.items() if machine.compute_problem}
    failed |= {
        rank: f"{machine.wrong} elements of a matrix product are wrong"
        for rank, machine in machines.items()
        if machine.wrong
    }
    findings = rules.attribute_problems("computation", failed, nodes, alone="node")
    seconds = {rank: machine.seconds for rank, machine in machines.items() if machine.seconds}
    if not seconds:
        return findings
    findings += rules.slow_computation(seconds, nodes, factor, slow)
    slowest = max(seconds, key=lambda rank: seconds[rank])
    return findings or [
        ok(
            "computation",
            f"a matrix product takes {min(seconds.values()) * 1e3:.1f} to {seconds[slowest] * 1e3:.1f} ms, slowest on "
            f"rank {slowest} ({nodes[slowest]})",
        )
    ]


def assess_run_directory(written: Mapping[int, DirectoryReport], nodes: Nodes) -> list[Finding]:
    """Assess whether all ranks could write to the run directory and see the files of data and weights."""
    failed = {rank: report.problem for rank, report in written.items() if report.problem}
    missing = {rank: report.missing for rank, report in written.items() if report.missing}
    return [*rules.attribute_problems("run directory", failed, nodes), *rules.missing_paths(missing, nodes)]


def assess_network(
    reports: Mapping[int, NetworkReport], device: str, nodes: Nodes, factor: float, slow: SlowLevel
) -> list[Finding]:
    """Assess the links between nodes and the all-reduce; `device` is the kind of device."""
    failed = {rank: report for rank, report in reports.items() if report.problem}
    if failed:
        phases = {rank: report.phase for rank, report in failed.items()}
        problems = {rank: report.problem for rank, report in failed.items()}
        return rules.first_failed_ranks("network", phases, problems, nodes)
    size = MESSAGE_BYTES[device]
    return [*_assess_links(reports, size, nodes, factor, slow), *_assess_all_reduce(reports, size, nodes)]


def _assess_links(
    reports: Mapping[int, NetworkReport], size: int, nodes: Nodes, factor: float, slow: SlowLevel
) -> list[Finding]:
    bandwidths = {
        (nodes[rank], other): 2 * size / seconds  # there and back
        for rank, report in reports.items()
        for other, seconds in report.link_seconds.items()
    }
    if not bandwidths:
        return []
    slowest = min(bandwidths, key=lambda link: bandwidths[link])
    text = (
        f"{len(bandwidths)} between neighbouring nodes, {bandwidths[slowest] / 1e9:.2f} to "
        f"{max(bandwidths.values()) / 1e9:.2f} GB/s, slowest {' - '.join(slowest)}"
    )
    return rules.slow_links(bandwidths, factor, slow) or [ok("links", text)]


def _assess_all_reduce(reports: Mapping[int, NetworkReport], size: int, nodes: Nodes) -> list[Finding]:
    wrong = {
        rank: f"{report.wrong} of {size // 4} sums are wrong"
        for rank, report in reports.items()
        if report.wrong
    }
    if len(wrong) == len(reports) and len(set(nodes.values())) > 1:
        return [node_failure("all-reduce", f"{wrong[0]} on every rank", None)]
    return rules.attribute_problems("all-reduce", wrong, nodes, alone="node") or [
        ok(
            "all-reduce",
            describe_bandwidth(size, max(report.seconds for report in reports.values()), len(reports)),
        )
    ]


def describe_bandwidth(size: int, seconds: float, ranks: int) -> str:
    """Describe time and bandwidths of an all-reduce of `size` bytes, defined as in nccl-tests.

    The algorithm bandwidth is size / seconds. The bus bandwidth is that times 2(n-1)/n for n ranks: the load of the
    slowest link, independent of n and comparable with the hardware's bandwidth.
    """
    algorithm = size / seconds / 1e9
    bus = algorithm * 2 * (ranks - 1) / ranks
    return (
        f"{size / 2**20:.0f} MiB over {count(ranks, 'rank')} in {seconds * 1e3:.1f} ms: "
        f"algorithm bandwidth {algorithm:.2f} GB/s (size / time), bus bandwidth {bus:.2f} GB/s (x 2(n-1)/n)"
    )
