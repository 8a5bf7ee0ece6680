"""Procedure of the checks before a run: all ranks present, equal, on a shared file system, correct and fast.

Every rank measures (`probes`), rank 0 assesses the reports (`verdict`), and all ranks receive the verdict. All messages
go over the rendezvous store, so that a missing or hanging rank is named and not waited for.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_qwenvl.config.schema import RuntimeConfig
from megatron_qwenvl.runtime.devices import choose_device
from megatron_qwenvl.runtime.environment import Environment, facts_equal_on_all_ranks
from megatron_qwenvl.runtime.processes import ProcessInfo

from . import rules
from .exchange import Exchange, open_store
from .placement import RankPlacement, place_ranks
from .probes import (
    DirectoryReport,
    MachineReport,
    NetworkPlan,
    NetworkReport,
    ProbeTimeoutError,
    describe_error,
    find_files,
    probe_machine,
    probe_network,
    remove_files,
    run_with_timeout,
    write_own_file,
)
from .rules import Finding, SlowLevel, count, ok, run_failure, warning
from .verdict import (
    Verdict,
    assess_machines,
    assess_network,
    assess_run_directory,
    assess_versions,
    can_form_group,
    exit_code,
    unresponsive_ranks,
)

_GRACE_SECONDS = 2.0
"""Extra time of rank 0 beyond the time given to all ranks."""


@dataclass(frozen=True)
class Checklist:
    """Subject and time limits of the checks."""

    run_dir: Path
    """Directory that all ranks must share and be able to write."""
    runtime: RuntimeConfig
    """Requested device and kernels."""
    checkpoint_bytes: int = 0
    """Size of one checkpoint; 0: the run saves none."""
    checkpoints: int = 1
    """Checkpoints that the run writes before it removes one."""
    paths: tuple[Path, ...] = ()
    """Files and directories that must exist on every node."""
    rank0_checks: Callable[[], Sequence[Finding]] = tuple
    """Further checks, performed by rank 0 alone."""
    deadline: float = 30.0
    """Seconds for all ranks to report, and the limit of each later step; all steps take at most twice as long."""
    file_seconds: float = 10.0
    """Time after which a file that one rank wrote must be visible to all."""
    slow_factor: float = 2.0
    """A node that is slower than the median by this factor, in computation or in its links, is reported."""
    slow: SlowLevel = "warning"
    """Level of the finding of a slow node."""


def run_preflight(
    process: ProcessInfo,
    environment: Environment,
    checklist: Checklist,
    on_finding: Callable[[Finding], None] = lambda finding: None,
    on_complete: Callable[[Sequence[Finding]], None] = lambda findings: None,
) -> Verdict:
    """Perform all checks; collective over all ranks.

    Args:
        process: rank and rendezvous of this process.
        environment: environment of this process.
        checklist: subject of the checks; the same on all ranks except for `rank0_checks`.
        on_finding: called on rank 0 with every finding as it is made.
        on_complete: called on rank 0 with all findings before any rank receives the verdict: launchers end all
            processes once one has failed.

    Raises:
        RendezvousError: the rendezvous failed or rank 0 has ended; raised on each rank that notices.
    """
    # The other ranks give up later than rank 0, which reports the missing ones.
    extra = min(10.0, checklist.deadline) if process.rank else 0.0
    exchange = Exchange(process, checklist.deadline + extra)
    return _Preflight(exchange, environment, checklist, on_finding, on_complete).run()


@dataclass
class _Preflight:
    """Steps of the checks on one rank. A step ends with rank 0's answer to all ranks; None ends the checks."""

    exchange: Exchange
    environment: Environment
    checklist: Checklist
    on_finding: Callable[[Finding], None]
    on_complete: Callable[[Sequence[Finding]], None]
    findings: list[Finding] = field(default_factory=list)
    nodes: dict[int, str] = field(default_factory=dict)
    """Node of every rank; on rank 0 alone."""
    token: str = ""
    """Random name of the files of these checks."""
    can_form_group: bool = False
    """Whether a process group of all ranks can be tried; on rank 0 alone."""
    began: float = field(default_factory=time.monotonic)

    def run(self) -> Verdict:
        try:
            if (
                (seconds := self._register_ranks())
                and (writers := self._probe_machines(seconds)) is not None
                and (plan := self._check_shared_files(writers))
            ):
                self._probe_network(plan)
        finally:
            self._remove_files()
        return self._announce_verdict()

    @property
    def process(self) -> ProcessInfo:
        return self.exchange.process

    def _step(self, topic: str, value: Any, seconds: float, assess: Callable[[dict[int, Any]], Any]) -> Any:
        """Send this rank's value to rank 0, and return rank 0's answer, the result of `assess` on all values.

        The answer is None, which ends the checks, if a rank did not send a value in time.
        """
        self.exchange.send(topic, value)
        if self.process.rank > 0:
            return self.exchange.receive(f"{topic}/answer", 2 * self.checklist.deadline)
        values = self.exchange.gather(topic, seconds)
        unresponsive = unresponsive_ranks(topic, list(values), seconds, self.nodes)
        self._record(unresponsive)
        answer = None if unresponsive else assess(values)
        self.exchange.broadcast(f"{topic}/answer", answer)
        return answer

    def _seconds_left(self) -> float:
        """Time limit of the next step, such that all steps together take less than twice the deadline."""
        rest = 2 * (self.checklist.deadline - _GRACE_SECONDS) - (time.monotonic() - self.began)
        return max(1.0, min(self.checklist.deadline, rest) - _GRACE_SECONDS)

    def _record(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            self.findings.append(finding)
            self.on_finding(finding)

    def _register_ranks(self) -> float | None:
        """Register all ranks and compare their versions; returns the time limit of the next step in seconds."""
        placement = self.environment.node, self.process.local_rank, self.process.local_world_size
        value = {"placement": placement, "facts": facts_equal_on_all_ranks(self.environment)}
        answer = self._step("ranks", value, self.checklist.deadline, self._assess_arrival)
        if answer is None:
            return None
        self.token = answer["token"]
        return float(answer["seconds"])

    def _assess_arrival(self, values: dict[int, Any]) -> Any:
        placements = {rank: RankPlacement(*value["placement"]) for rank, value in values.items()}
        self.nodes = {rank: placement.node for rank, placement in placements.items()}
        world, places = self.process.world_size, place_ranks(self.process, placements)
        missing = rules.missing_ranks(world, self.nodes, places, self.checklist.deadline)
        names, seconds = sorted(set(self.nodes.values())), time.monotonic() - self.began
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        self._record(
            missing
            or [ok("ranks", f"{world} on {count(len(names), 'node')} ({shown}) after {seconds:.1f} s")]
        )
        self._record(assess_versions({rank: value["facts"] for rank, value in values.items()}, self.nodes))
        return None if missing else {"token": uuid.uuid4().hex[:12], "seconds": self._seconds_left()}

    def _probe_machines(self, seconds: float) -> list[int] | None:
        """Test device and run directory of every rank; returns the ranks that could write to the directory."""
        end = time.monotonic() + seconds
        rank, checklist = self.process.rank, self.checklist
        try:
            machine = run_with_timeout(seconds, lambda: probe_machine(self.process, checklist.runtime))
        except Exception as error:
            machine = MachineReport(device_problem=describe_error(error))
        try:
            left = max(1.0, end - time.monotonic())
            written = run_with_timeout(
                left, lambda: write_own_file(checklist.run_dir, self.token, rank, checklist.paths)
            )
        except Exception as error:
            written = DirectoryReport(f"{checklist.run_dir}: {describe_error(error)}")
        if rank == 0:
            self._run_rank0_checks(max(1.0, end - time.monotonic()))
        value = {"machine": asdict(machine), "written": asdict(written)}
        writers: list[int] | None = self._step(
            "machine", value, seconds + _GRACE_SECONDS, self._assess_reports
        )
        return writers

    def _run_rank0_checks(self, seconds: float) -> None:
        try:
            self._record(run_with_timeout(seconds, self.checklist.rank0_checks))
        except ProbeTimeoutError as error:
            self._record([warning("start", f"data and weights: {error}; the run will check them itself")])
        except Exception as error:
            self._record([run_failure("start", describe_error(error))])

    def _assess_reports(self, values: dict[int, Any]) -> list[int]:
        machines = {rank: MachineReport(**value["machine"]) for rank, value in values.items()}
        written = {rank: DirectoryReport(**value["written"]) for rank, value in values.items()}
        checklist = self.checklist
        self._record(assess_machines(machines, self.nodes, checklist.slow_factor, checklist.slow))
        self._record(assess_run_directory(written, self.nodes))
        writers = [rank for rank, report in written.items() if not report.problem]
        if checklist.checkpoint_bytes and writers:
            free = written[writers[0]].free_bytes
            size, run_dir = checklist.checkpoint_bytes, str(checklist.run_dir)
            self._record([rules.free_space(free, size, checklist.checkpoints, run_dir)])
        self.can_form_group = can_form_group(machines)
        return writers

    def _check_shared_files(self, writers: list[int]) -> NetworkPlan | None:
        """Check that every rank sees the files of the others; returns the plan of the network test."""
        limit, seen = self.checklist.file_seconds, list[int]()
        if self.process.rank in writers:
            with suppress(Exception):  # a rank whose file system hangs now has seen no files
                seen = run_with_timeout(
                    limit + 1, lambda: find_files(self.checklist.run_dir, self.token, writers, limit)
                )
        answer = self._step(
            "shared files",
            seen,
            limit + 1 + _GRACE_SECONDS,
            lambda values: self._assess_shared_files(writers, values),
        )
        return None if answer is None else NetworkPlan(**answer)

    def _assess_shared_files(self, writers: list[int], values: dict[int, list[int]]) -> Any:
        run_dir = str(self.checklist.run_dir)
        unshared = rules.unshared_directory({rank: values[rank] for rank in writers}, self.nodes, run_dir)
        self._record(unshared)
        if not unshared and len(writers) == self.process.world_size:
            self._record([ok("run directory", f"{run_dir} is written and seen by all ranks")])
        if not self.can_form_group:
            return None
        names = list(dict.fromkeys(self.nodes[rank] for rank in sorted(self.nodes)))
        leaders = {name: min(rank for rank in self.nodes if self.nodes[rank] == name) for name in names}
        return asdict(NetworkPlan(self._seconds_left(), rules.link_rounds(names), leaders))

    def _probe_network(self, plan: NetworkPlan) -> None:
        """Measure the network between all ranks."""
        settings, process, report = self.checklist.runtime, self.process, NetworkReport()
        device = choose_device(settings.device, process.local_rank, process.launcher)

        def probe() -> None:
            # A separate connection: a thread that hangs in the store must not block this one.
            store = open_store(process, plan.seconds, host=False)
            probe_network(process, device, store, plan, report)

        try:
            run_with_timeout(plan.seconds, probe)
        except Exception as error:
            report.problem = f"{report.doing}: {describe_error(error)}"

        def assess(values: dict[int, Any]) -> None:
            reports = {rank: NetworkReport(**value) for rank, value in values.items()}
            checklist = self.checklist
            self._record(
                assess_network(reports, device.type, self.nodes, checklist.slow_factor, checklist.slow)
            )

        self._step("network", asdict(report), plan.seconds + _GRACE_SECONDS, assess)

    def _remove_files(self) -> None:
        if self.token:
            with suppress(Exception):  # a file system that hangs has been reported
                run_with_timeout(
                    5, lambda: remove_files(self.checklist.run_dir, self.token, self.process.rank)
                )

    def _announce_verdict(self) -> Verdict:
        if self.process.rank == 0:
            self.on_complete(self.findings)
            code = exit_code(self.findings)
            self.exchange.broadcast("verdict", code)
        else:
            code = self.exchange.receive("verdict", 2 * self.checklist.deadline)
        self.exchange.close(self.nodes, 5)
        return Verdict(code, tuple(self.findings))
