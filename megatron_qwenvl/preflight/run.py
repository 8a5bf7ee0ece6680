"""The checks before a run: are all ranks there, equal, on a shared file system, right and fast?

Every rank measures (`probes`), rank 0 concludes (`judge`), and all learn the verdict. All of it
goes over the rendezvous store, so that a rank that is missing or stuck is named instead of waited for.
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
from .findings import Finding, Slow, count, exit_code, ok, run_failure, warning
from .judge import can_meet, judge_facts, judge_machines, judge_network, judge_written, silent_ranks
from .placement import Seat, place_ranks
from .probes import (
    Links,
    MachineReport,
    NetworkReport,
    OverdueError,
    WriteReport,
    describe_error,
    find_files,
    probe_machine,
    probe_network,
    remove_files,
    within,
    write_own_file,
)

_GRACE_SECONDS = 2.0
"""What rank 0 waits beyond the time that it gave to all."""


@dataclass(frozen=True)
class Checklist:
    """What is to be checked."""

    run_dir: Path
    """Directory that all ranks must share and be able to write."""
    runtime: RuntimeConfig
    """Wanted device and kernels."""
    checkpoint_bytes: int = 0
    """Size of one checkpoint; 0: the run saves none."""
    checkpoints: int = 1
    """Checkpoints that the run writes before it removes one."""
    paths: tuple[Path, ...] = ()
    """Files and directories that every node must see."""
    own_checks: Callable[[], Sequence[Finding]] = tuple
    """Further checks, made on rank 0 alone."""
    deadline: float = 30.0
    """Seconds that all ranks have to report, and each later step at most; all of it takes at most twice as long."""
    file_seconds: float = 10.0
    """Time after which a file that one rank wrote must be seen by all."""
    slow_factor: float = 2.0
    """A node that is this much slower than the median, in computing or in its links, is named."""
    slow: Slow = "warning"
    """What a slow node is."""


@dataclass(frozen=True)
class Verdict:
    """The end of the checks, the same on all ranks."""

    code: int
    """0: passed, 1: the run cannot work, 3: nodes are bad."""
    findings: tuple[Finding, ...]
    """On rank 0: everything that was found."""


def run_preflight(
    process: ProcessInfo,
    environment: Environment,
    checklist: Checklist,
    say: Callable[[Finding], None] = lambda finding: None,
    conclude: Callable[[Sequence[Finding]], None] = lambda findings: None,
) -> Verdict:
    """Make all checks; collective over all ranks.

    Args:
        process: the place of this process.
        environment: where it runs.
        checklist: what to check; the same on all ranks but for `own_checks`.
        say: told every finding on rank 0, as it is made.
        conclude: told all of them on rank 0 before any rank learns the verdict: launchers end all processes once one
            has failed.

    Raises:
        RendezvousError: the ranks cannot meet, or rank 0 has gone; told by the rank that finds it so.
    """
    # The others give up after rank 0, which names those that did not come.
    patience = min(10.0, checklist.deadline) if process.rank else 0.0
    exchange = Exchange(process, checklist.deadline + patience)
    return _Preflight(exchange, environment, checklist, say, conclude).run()


@dataclass
class _Preflight:
    """The steps on one rank. A step ends with rank 0's answer to all; no answer ends the checks."""

    exchange: Exchange
    environment: Environment
    checklist: Checklist
    say: Callable[[Finding], None]
    conclude: Callable[[Sequence[Finding]], None]
    findings: list[Finding] = field(default_factory=list)
    nodes: dict[int, str] = field(default_factory=dict)
    """On rank 0: the node of every rank."""
    token: str = ""
    """Tells this run's files from others'."""
    can_meet: bool = False
    """On rank 0: whether a process group of all ranks can be tried."""
    began: float = field(default_factory=time.monotonic)

    def run(self) -> Verdict:
        try:
            if (
                (seconds := self._arrive())
                and (writers := self._measure(seconds)) is not None
                and (links := self._look(writers))
            ):
                self._communicate(links)
        finally:
            self._tidy()
        return self._conclude()

    @property
    def process(self) -> ProcessInfo:
        return self.exchange.process

    def _step(self, topic: str, value: Any, seconds: float, judge: Callable[[dict[int, Any]], Any]) -> Any:
        """Every rank's value to rank 0, and what it answers to all; None ends the checks."""
        self.exchange.put(topic, value)
        if self.process.rank > 0:
            return self.exchange.hear(f"{topic}/answer", 2 * self.checklist.deadline)
        values = self.exchange.collect(topic, seconds)
        silent = silent_ranks(topic, list(values), seconds, self.nodes)
        self._add(silent)
        answer = None if silent else judge(values)
        self.exchange.tell(f"{topic}/answer", answer)
        return answer

    def _left(self) -> float:
        """Seconds that the next step may take, such that all steps take less than two deadlines."""
        rest = 2 * (self.checklist.deadline - _GRACE_SECONDS) - (time.monotonic() - self.began)
        return max(1.0, min(self.checklist.deadline, rest) - _GRACE_SECONDS)

    def _add(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            self.findings.append(finding)
            self.say(finding)

    def _arrive(self) -> float | None:
        """Who is there, and are they equal? Answers with the seconds for the next step."""
        seat = self.environment.node, self.process.local_rank, self.process.local_world_size
        value = {"seat": seat, "facts": facts_equal_on_all_ranks(self.environment)}
        answer = self._step("ranks", value, self.checklist.deadline, self._judge_arrival)
        if answer is None:
            return None
        self.token = answer["token"]
        return float(answer["seconds"])

    def _judge_arrival(self, values: dict[int, Any]) -> Any:
        seats = {rank: Seat(*value["seat"]) for rank, value in values.items()}
        self.nodes = {rank: seat.node for rank, seat in seats.items()}
        world, places = self.process.world_size, place_ranks(self.process, seats)
        missing = rules.missing_ranks(world, self.nodes, places, self.checklist.deadline)
        names, seconds = sorted(set(self.nodes.values())), time.monotonic() - self.began
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        self._add(
            missing
            or [ok("ranks", f"{world} on {count(len(names), 'node')} ({shown}) after {seconds:.1f} s")]
        )
        self._add(judge_facts({rank: value["facts"] for rank, value in values.items()}, self.nodes))
        return None if missing else {"token": uuid.uuid4().hex[:12], "seconds": self._left()}

    def _measure(self, seconds: float) -> list[int] | None:
        """What can each machine do, and does it see the files? Answers with the ranks that could write."""
        end = time.monotonic() + seconds
        rank, checklist = self.process.rank, self.checklist
        try:
            machine = within(seconds, lambda: probe_machine(self.process, checklist.runtime))
        except Exception as error:
            machine = MachineReport(device_problem=describe_error(error))
        try:
            left = max(1.0, end - time.monotonic())
            written = within(
                left, lambda: write_own_file(checklist.run_dir, self.token, rank, checklist.paths)
            )
        except Exception as error:
            written = WriteReport(f"{checklist.run_dir}: {describe_error(error)}")
        if rank == 0:
            self._check_own(max(1.0, end - time.monotonic()))
        value = {"machine": asdict(machine), "written": asdict(written)}
        writers: list[int] | None = self._step(
            "machine", value, seconds + _GRACE_SECONDS, self._judge_machines
        )
        return writers

    def _check_own(self, seconds: float) -> None:
        try:
            self._add(within(seconds, self.checklist.own_checks))
        except OverdueError as error:
            self._add([warning("start", f"data and weights: {error}; the run will look itself")])
        except Exception as error:
            self._add([run_failure("start", describe_error(error))])

    def _judge_machines(self, values: dict[int, Any]) -> list[int]:
        machines = {rank: MachineReport(**value["machine"]) for rank, value in values.items()}
        written = {rank: WriteReport(**value["written"]) for rank, value in values.items()}
        checklist = self.checklist
        self._add(judge_machines(machines, self.nodes, checklist.slow_factor, checklist.slow))
        self._add(judge_written(written, self.nodes))
        writers = [rank for rank, report in written.items() if not report.problem]
        if checklist.checkpoint_bytes and writers:
            free = written[writers[0]].free_bytes
            size, run_dir = checklist.checkpoint_bytes, str(checklist.run_dir)
            self._add([rules.free_space(free, size, checklist.checkpoints, run_dir)])
        self.can_meet = can_meet(machines)
        return writers

    def _look(self, writers: list[int]) -> Links | None:
        """Does every rank see the others' files? Answers with the links to measure."""
        limit, seen = self.checklist.file_seconds, list[int]()
        if self.process.rank in writers:
            with suppress(Exception):  # whose file system hangs now has not seen the others
                seen = within(
                    limit + 1, lambda: find_files(self.checklist.run_dir, self.token, writers, limit)
                )
        answer = self._step(
            "shared files", seen, limit + 1 + _GRACE_SECONDS, lambda values: self._judge_seen(writers, values)
        )
        return None if answer is None else Links(**answer)

    def _judge_seen(self, writers: list[int], values: dict[int, list[int]]) -> Any:
        run_dir = str(self.checklist.run_dir)
        apart = rules.not_shared({rank: values[rank] for rank in writers}, self.nodes, run_dir)
        self._add(apart)
        if not apart and len(writers) == self.process.world_size:
            self._add([ok("run directory", f"{run_dir} is written and seen by all ranks")])
        if not self.can_meet:
            return None
        names = list(dict.fromkeys(self.nodes[rank] for rank in sorted(self.nodes)))
        speakers = {name: min(rank for rank in self.nodes if self.nodes[rank] == name) for name in names}
        return asdict(Links(self._left(), rules.link_rounds(names), speakers))

    def _communicate(self, links: Links) -> None:
        """How fast is the network?"""
        settings, process, report = self.checklist.runtime, self.process, NetworkReport()
        device = choose_device(settings.device, process.local_rank, process.launcher)

        def probe() -> None:
            # A connection of its own: a thread that hangs in the store must not keep this one from answering.
            store = open_store(process, links.seconds, host=False)
            probe_network(process, device, store, links, report)

        try:
            within(links.seconds, probe)
        except Exception as error:
            report.problem = f"{report.doing}: {describe_error(error)}"

        def judge(values: dict[int, Any]) -> None:
            reports = {rank: NetworkReport(**value) for rank, value in values.items()}
            checklist = self.checklist
            self._add(judge_network(reports, device.type, self.nodes, checklist.slow_factor, checklist.slow))

        self._step("network", asdict(report), links.seconds + _GRACE_SECONDS, judge)

    def _tidy(self) -> None:
        if self.token:
            with suppress(Exception):  # a file system that hangs has been reported
                within(5, lambda: remove_files(self.checklist.run_dir, self.token, self.process.rank))

    def _conclude(self) -> Verdict:
        if self.process.rank == 0:
            self.conclude(self.findings)
            code = exit_code(self.findings)
            self.exchange.tell("verdict", code)
        else:
            code = self.exchange.hear("verdict", 2 * self.checklist.deadline)
        self.exchange.leave(self.nodes, 5)
        return Verdict(code, tuple(self.findings))
