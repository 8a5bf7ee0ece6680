"""From the reports of all ranks to findings, one step of the checks at a time. Pure functions on rank 0.

`nodes` is the node of every rank; `factor` is how many times slower than the median is slow, `slow` what that is then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import rules
from .findings import Finding, Slow, by_node, count, name_ranks, node_failure, ok
from .probes import MESSAGE_BYTES, MachineReport, NetworkReport, WriteReport

Nodes = Mapping[int, str]


def judge_facts(facts: Mapping[int, Mapping[str, str]], nodes: Nodes) -> list[Finding]:
    """Versions, equal everywhere."""
    common = (f"{name} {value}" for name, value in facts[0].items() if value not in ("None", "none"))
    return rules.differing_facts("versions", facts, nodes) or [ok("versions", f"equal: {', '.join(common)}")]


def silent_ranks(check: str, answered: Sequence[int], seconds: float, nodes: Nodes) -> list[Finding]:
    """Names ranks that had reported before and have stopped or hang."""
    return [
        node_failure(check, f"{name_ranks(ranks)} stopped or hangs: no answer within {seconds:.0f} s", node)
        for node, ranks in by_node(nodes.keys() - set(answered), nodes).items()
    ]


def can_meet(machines: Mapping[int, MachineReport]) -> bool:
    """Whether all ranks have a working device of one kind, so that a process group of all can be tried."""
    broken = any(machine.device_problem or machine.compute_problem for machine in machines.values())
    return not broken and len({machine.device for machine in machines.values()}) == 1


def judge_machines(
    machines: Mapping[int, MachineReport], nodes: Nodes, factor: float, slow: Slow
) -> list[Finding]:
    """Device, kernels and computation of all ranks."""
    broken = {rank: machine.device_problem for rank, machine in machines.items() if machine.device_problem}
    working = {rank: machine for rank, machine in machines.items() if rank not in broken}
    findings = rules.spread("device", broken, nodes, alone="node")
    if not working:
        return findings
    return [
        *findings,
        *_judge_devices(working, nodes, everywhere=not broken),
        *_judge_kernels(working, nodes),
        *_judge_computation(working, nodes, factor, slow),
    ]


def _judge_devices(machines: Mapping[int, MachineReport], nodes: Nodes, everywhere: bool) -> list[Finding]:
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


def _judge_kernels(machines: Mapping[int, MachineReport], nodes: Nodes) -> list[Finding]:
    unusable = {rank: machine.kernel_problem for rank, machine in machines.items() if machine.kernel_problem}
    chosen = {rank: {"kernels": machine.kernels} for rank, machine in machines.items() if machine.kernels}
    findings = [
        *rules.spread("kernels", unusable, nodes),
        *rules.differing_facts("kernels", chosen, nodes),
    ]
    return findings or [ok("kernels", machines[min(machines)].kernels)]


def _judge_computation(
    machines: Mapping[int, MachineReport], nodes: Nodes, factor: float, slow: Slow
) -> list[Finding]:
    failed = {rank: machine.compute_problem for rank, machine in machines.items() if machine.compute_problem}
    failed |= {
        rank: f"{machine.wrong} elements of a matrix product are wrong"
        for rank, machine in machines.items()
        if machine.wrong
    }
    findings = rules.spread("computation", failed, nodes, alone="node")
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


def judge_written(written: Mapping[int, WriteReport], nodes: Nodes) -> list[Finding]:
    """Whether all ranks could write into the run directory, and see the files that they will need."""
    failed = {rank: report.problem for rank, report in written.items() if report.problem}
    missing = {rank: report.missing for rank, report in written.items() if report.missing}
    return [*rules.spread("run directory", failed, nodes), *rules.unseen_paths(missing, nodes)]


def judge_network(
    reports: Mapping[int, NetworkReport], device: str, nodes: Nodes, factor: float, slow: Slow
) -> list[Finding]:
    """Links between nodes and the all-reduce; `device` is the kind of device."""
    failed = {rank: report for rank, report in reports.items() if report.problem}
    if failed:
        stages = {rank: report.stage for rank, report in failed.items()}
        problems = {rank: report.problem for rank, report in failed.items()}
        return rules.stuck_ranks("network", stages, problems, nodes)
    size = MESSAGE_BYTES[device]
    return [*_judge_links(reports, size, nodes, factor, slow), *_judge_sum(reports, size, nodes)]


def _judge_links(
    reports: Mapping[int, NetworkReport], size: int, nodes: Nodes, factor: float, slow: Slow
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


def _judge_sum(reports: Mapping[int, NetworkReport], size: int, nodes: Nodes) -> list[Finding]:
    wrong = {
        rank: f"{report.wrong} of {size // 4} sums are wrong"
        for rank, report in reports.items()
        if report.wrong
    }
    if len(wrong) == len(reports) and len(set(nodes.values())) > 1:
        return [node_failure("all-reduce", f"{wrong[0]} on every rank", None)]
    return rules.spread("all-reduce", wrong, nodes, alone="node") or [
        ok(
            "all-reduce",
            describe_bandwidth(size, max(report.seconds for report in reports.values()), len(reports)),
        )
    ]


def describe_bandwidth(size: int, seconds: float, ranks: int) -> str:
    """Time and bandwidths of an all-reduce of `size` bytes.

    The algorithm's bandwidth is size / seconds. The bus bandwidth, that times 2(n-1)/n for n ranks, is what the slowest
    link must carry, whatever n, and compares with the hardware's.
    """
    algorithm = size / seconds / 1e9
    bus = algorithm * 2 * (ranks - 1) / ranks
    what = f"{size / 2**20:.0f} MiB over {count(ranks, 'rank')} in {seconds * 1e3:.1f} ms"
    return f"{what}: algorithm bandwidth {algorithm:.2f} GB/s (size / time), bus bandwidth {bus:.2f} GB/s (x 2(n-1)/n)"
