"""The checks before a run, between real processes over gloo; every rank may play a node of its own."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_qwenvl.config.schema import RuntimeConfig
from megatron_qwenvl.preflight import probes
from megatron_qwenvl.preflight.exchange import Exchange
from megatron_qwenvl.preflight.probes import NetworkReport
from megatron_qwenvl.preflight.rules import Finding
from megatron_qwenvl.preflight.run import Checklist, run_preflight
from megatron_qwenvl.preflight.verdict import bad_nodes
from megatron_qwenvl.runtime.environment import describe_environment, facts_equal_on_all_ranks
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.unit.data.data_cases import png_image, random_record, sample, write_source

from .harness import run_ranks

ROOT = Path(__file__).parents[2]
Sabotage = Callable[[int, Checklist], tuple[Checklist, dict[str, str]]]


# --- library: forked ranks, each a node of its own


def as_nodes(process: ProcessInfo, run_dir: Path, sabotage: Sabotage) -> tuple[int, list[Finding]]:
    """Run the checks on this rank as node `n<rank>`; `sabotage` changes its checklist and its package versions."""
    process = replace(process, local_rank=0, local_world_size=1)
    described = replace(describe_environment(process), node=f"n{process.rank}")
    checklist = Checklist(run_dir, RuntimeConfig(device="cpu"), 1000, 2, deadline=120, file_seconds=1)
    checklist, packages = sabotage(process.rank, checklist)
    described = replace(described, packages={**described.packages, **packages})
    verdict = run_preflight(process, described, checklist)
    return verdict.code, list(verdict.findings)


def check_nodes(ranks: int, run_dir: Path, sabotage: Sabotage) -> tuple[int, list[Finding]]:
    """The verdict, which all ranks must share, and rank 0's findings."""
    results = run_ranks(ranks, as_nodes, run_dir, sabotage)
    assert len({code for code, _ in results}) == 1
    return results[0]


def as_it_is(rank: int, checklist: Checklist) -> tuple[Checklist, dict[str, str]]:
    return checklist, {}


@pytest.fixture(scope="module")
def deadline(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds for a step where one will not finish: enough for good nodes on this machine, however busy it is now."""
    began = time.monotonic()
    check_nodes(3, tmp_path_factory.mktemp("run"), as_it_is)
    return 4 + 4 * (time.monotonic() - began)


def failures(findings: list[Finding]) -> list[str]:
    return [finding.line() for finding in findings if finding.level == "failure"]


def test_good_nodes_pass_and_leave_nothing_behind(tmp_path: Path) -> None:
    code, findings = check_nodes(3, tmp_path / "run", as_it_is)
    assert (code, failures(findings)) == (0, [])
    checks = [finding.check for finding in findings]
    assert {"ranks", "versions", "device", "kernels", "computation", "run directory", "space"} < set(checks)
    assert checks[-2:] == ["links", "all-reduce"]
    assert list((tmp_path / "run").iterdir()) == []


def test_another_version_on_one_node(tmp_path: Path) -> None:
    def other_torch(rank: int, checklist: Checklist) -> tuple[Checklist, dict[str, str]]:
        return checklist, {"torch": "1.0"} if rank == 1 else {}

    code, findings = check_nodes(3, tmp_path, other_torch)
    (failure,) = failures(findings)
    assert code == 3
    assert bad_nodes(findings) == ["n1"]
    assert "torch: expected 2." in failure and "as on 2 of 3 ranks, found 1.0 (rank 1)" in failure
    assert findings[-1].check == "all-reduce"  # the rest is checked all the same


def test_a_run_directory_that_one_node_does_not_share(tmp_path: Path) -> None:
    def elsewhere(rank: int, checklist: Checklist) -> tuple[Checklist, dict[str, str]]:
        return replace(checklist, run_dir=tmp_path / ("b" if rank == 2 else "a")), {}

    code, findings = check_nodes(3, tmp_path, elsewhere)
    (failure,) = failures(findings)
    assert (code, bad_nodes(findings)) == (3, ["n2"])
    assert (
        "is not shared with the other nodes: expected the files of 3 ranks, found those of rank 2" in failure
    )
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "b"]


def test_a_run_directory_that_nobody_shares(tmp_path: Path) -> None:
    def private(rank: int, checklist: Checklist) -> tuple[Checklist, dict[str, str]]:
        return replace(checklist, run_dir=tmp_path / str(rank)), {}

    code, findings = check_nodes(2, tmp_path, private)
    assert (code, bad_nodes(findings)) == (1, [])
    assert "every node sees its own files only" in failures(findings)[0]


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    def unwritable(rank: int, checklist: Checklist) -> tuple[Checklist, dict[str, str]]:
        return replace(checklist, run_dir=file / "run" if rank == 1 else tmp_path), {}

    code, findings = check_nodes(2, tmp_path, unwritable)
    assert (code, bad_nodes(findings)) == (3, ["n1"])
    assert f"{file}/run cannot be written: " in failures(findings)[0]

    code, findings = check_nodes(2, file / "run", as_it_is)
    assert (code, bad_nodes(findings)) == (1, [])


def test_data_that_one_node_does_not_see(tmp_path: Path) -> None:
    def blind(rank: int, checklist: Checklist) -> tuple[Checklist, dict[str, str]]:
        return replace(checklist, paths=(tmp_path / "none" if rank == 0 else tmp_path,)), {}

    code, findings = check_nodes(2, tmp_path, blind)
    assert (code, bad_nodes(findings)) == (3, ["n0"])


def test_too_little_space(tmp_path: Path) -> None:
    def huge(rank: int, checklist: Checklist) -> tuple[Checklist, dict[str, str]]:
        return replace(checklist, checkpoint_bytes=10**18), {}

    code, findings = check_nodes(2, tmp_path, huge)
    assert code == 1
    assert "a checkpoint takes 1000000000.00 GB" in failures(findings)[0]


def test_a_rank_that_dies_on_the_way_is_named(tmp_path: Path, deadline: float) -> None:
    results = run_ranks(3, with_a_death, tmp_path, deadline)
    code, findings = results[0]
    assert (code, bad_nodes(findings)) == (3, ["n1"])
    assert "stopped or hangs" in failures(findings)[0]


def with_a_death(process: ProcessInfo, run_dir: Path, deadline: float) -> tuple[int, list[Finding]]:
    """Rank 1 reports and is not heard of again."""
    if process.rank == 1:
        facts = facts_equal_on_all_ranks(describe_environment(process))
        Exchange(process, 120).send("ranks", {"placement": ("n1", 0, 1), "facts": facts})
        return 0, []

    def impatient(rank: int, checklist: Checklist) -> tuple[Checklist, dict[str, str]]:
        return replace(checklist, deadline=deadline), {}

    return as_nodes(process, run_dir, impatient)


class HangingPath(type(Path())):  # type: ignore[misc]
    """On a file system whose server is gone."""

    def __fspath__(self) -> str:
        time.sleep(1000)  # every call of the system asks for it
        return super().__fspath__()


def test_a_file_system_that_hangs_on_one_node(tmp_path: Path, deadline: float) -> None:
    def hanging(rank: int, checklist: Checklist) -> tuple[Checklist, dict[str, str]]:
        paths = (HangingPath("x") if rank == 1 else tmp_path,)
        return replace(checklist, deadline=deadline, paths=paths), {}

    code, findings = check_nodes(2, tmp_path, hanging)
    assert (code, bad_nodes(findings)) == (3, ["n1"])
    assert "not finished within" in failures(findings)[0]


SLOW, FAST = 0.5, 0.05
"""Seconds that a message takes at least behind a slow link, and that it counts as elsewhere, however busy the machine
that runs the test is."""


def test_a_slow_link_names_its_node(tmp_path: Path) -> None:
    results = run_ranks(4, with_a_slow_node, tmp_path)
    code, findings = results[0]
    slow = [finding for finding in findings if finding.level == "warning" and finding.check == "links"]
    assert code == 0
    assert [finding.node for finding in slow] == ["n2"]


def with_a_slow_node(process: ProcessInfo, run_dir: Path) -> tuple[int, list[Finding]]:
    """Rank 2 waits before every message, as behind a slow link."""
    if process.rank == 2:
        send = dist.send

        def slow_send(*args: Any, **kwargs: Any) -> None:
            time.sleep(SLOW)
            send(*args, **kwargs)

        dist.send = slow_send  # type: ignore[assignment]
    measure = probes._measure_link

    def measure_on_an_idle_machine(
        rank: int,
        leaders: dict[str, int],
        node: str,
        other: str,
        message: torch.Tensor,
        report: NetworkReport,
    ) -> None:
        measure(rank, leaders, node, other, message, report)
        if rank == leaders[node]:
            slow = "n2" in (node, other)
            assert not slow or report.link_seconds[other] >= SLOW
            report.link_seconds[other] = report.link_seconds[other] if slow else FAST

    probes._measure_link = measure_on_an_idle_machine
    return as_nodes(process, run_dir, as_it_is)


def test_a_link_that_hangs_names_its_ends(tmp_path: Path, deadline: float) -> None:
    code, findings = run_ranks(4, with_a_broken_link, tmp_path, deadline)[0]
    assert (code, bad_nodes(findings)) == (3, ["n1", "n2"])
    assert "messages between n1 and n2: not finished within" in failures(findings)[0]


def with_a_broken_link(process: ProcessInfo, run_dir: Path, deadline: float) -> tuple[int, list[Finding]]:
    """What rank 1 sends to rank 2 never goes out."""
    send = dist.send

    def lossy_send(tensor: torch.Tensor, receiver: int) -> None:
        if (process.rank, receiver) == (1, 2):
            time.sleep(1000)
        send(tensor, receiver)

    def impatient(rank: int, checklist: Checklist) -> tuple[Checklist, dict[str, str]]:
        return replace(checklist, deadline=deadline), {}

    dist.send = lossy_send  # type: ignore[assignment]
    return as_nodes(process, run_dir, impatient)


# --- the tool: real starts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, folder = random.Random(0), tmp_path_factory.mktemp("data")
    samples = [sample(f"{i:05d}", random_record("caption", rng), png=png_image()) for i in range(8)]
    write_source(folder / "mixed", samples, per_shard=4)
    return folder


def arguments(data: Path, run_dir: Path, *more: str) -> list[str]:
    sources = ["--data.sources", "[{name: mixed, path: mixed}]", "--data.validation_sources", "[]"]
    return [
        str(ROOT / "tools/preflight.py"), "--recipe", "tiny_stage1", "--run_dir", str(run_dir),
        "--data.root", str(data), *sources, "--deadline", "120", "--runtime.device", "cpu", *more,
    ]  # fmt: skip


def clean_environment(**more: str) -> dict[str, str]:
    given = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER_"))}
    return {**given, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        env=clean_environment(**environment),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_alone(*command: str) -> tuple[int, list[str], str]:
    """Exit code, lines and standard error of the tool as one process."""
    child = start(list(command))
    output, errors = child.communicate()
    return child.returncode, output.splitlines(), errors


@pytest.fixture(scope="module")
def start_deadline(data: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Seconds within which several processes that start together come, on this machine, however busy it is now."""
    began = time.monotonic()
    code, lines, errors = run_alone(*arguments(data, tmp_path_factory.mktemp("run"), "--deadline", "300"))
    assert code == 0, errors
    assert lines[-1].startswith("preflight: passed in ")
    return 2 + int(time.monotonic() - began)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def start_rank(rank: int, world: int, port: str, command: list[str]) -> subprocess.Popen[str]:
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURMD_NODENAME": "node1"}
    return start(command, **rendezvous, **{name: str(value) for name, value in place.items()})


def test_four_ranks_of_torchrun_pass(data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("of an earlier job\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = arguments(data, tmp_path / "run", "--bad_nodes", str(bad), "--parallel.tensor", "2")
    child = start([*launcher, "--nproc-per-node", "4", *command])
    output, errors = child.communicate()
    assert child.returncode == 0, errors
    lines = output.splitlines()
    assert lines[0].startswith("ok       ranks: 4 on 1 node")
    assert any(line.startswith("ok       all-reduce: 4 MiB over 4 ranks") for line in lines)
    assert lines[-1].startswith("preflight: passed in ")
    assert not bad.exists()


def test_a_rank_that_never_comes_is_named(data: Path, tmp_path: Path, start_deadline: int) -> None:
    bad, port = tmp_path / "bad", free_port()
    command = arguments(data, tmp_path / "run", "--bad_nodes", str(bad), "--deadline", str(start_deadline))
    children = [start_rank(rank, 3, port, command) for rank in (0, 2)]
    outputs = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [3, 3]
    (last,) = outputs[0][0].splitlines()[-1:]
    assert last == f"preflight: FAILED: ranks: node1: rank 1 did not report within {start_deadline} s"
    assert outputs[1][0] == ""
    assert bad.read_text() == "node1\n"


def test_a_rank_that_cannot_reach_the_others_says_so(data: Path, tmp_path: Path) -> None:
    port = free_port()
    child = start_rank(1, 2, port, arguments(data, tmp_path, "--deadline", "2"))
    _, errors = child.communicate()
    assert child.returncode == 3
    expected = f"preflight: FAILED: rank 1: the rendezvous of rank 0 at tcp://127.0.0.1:{port} does not answer within"
    assert any(line.startswith(expected) for line in errors.splitlines()), errors


def test_a_port_that_is_taken_is_no_nodes_fault(data: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        child = start_rank(0, 2, port, arguments(data, tmp_path, "--deadline", "2"))
        _, errors = child.communicate()
    assert child.returncode == 1
    assert "cannot be opened" in errors


def test_missing_data_is_one_clear_line(data: Path, tmp_path: Path) -> None:
    code, lines, _ = run_alone(*arguments(tmp_path / "nowhere", tmp_path / "run"))
    assert code == 1
    assert lines[-1] == f"preflight: FAILED: data: {tmp_path}/nowhere/mixed: no such directory of shards"
    assert sum(line.startswith("failure") for line in lines) == 1


def test_a_corrupt_index_is_one_clear_line(tmp_path: Path) -> None:
    write_source(tmp_path / "mixed", [sample("0", random_record("text", random.Random(0)))], per_shard=1)
    (tmp_path / "mixed/manifest.json").write_text('{"format": 1, "shards": 3')
    code, lines, errors = run_alone(*arguments(tmp_path, tmp_path / "run"))
    assert code == 1, errors
    assert lines[-1].startswith(
        f"preflight: FAILED: data: {tmp_path}/mixed/manifest.json: damaged manifest: "
    )


def test_start_weights_that_are_missing_or_damaged(data: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    wanted = arguments(data, tmp_path / "run", "--checkpoint.init_from", str(weights))
    code, lines, _ = run_alone(*wanted)
    assert code == 1
    assert lines[-1].startswith(f"preflight: FAILED: weights: {weights}: not a checkpoint")

    weights.mkdir()
    (weights / "manifest.json").write_text("{")
    code, lines, _ = run_alone(*wanted)
    assert code == 1
    assert lines[-1].startswith(f"preflight: FAILED: weights: {weights}/manifest.json: damaged: ")
    assert sum(line.startswith("failure") for line in lines) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--deadline", "soon"], "argument --deadline: expected 1 to 3600 seconds, found soon"),
        (["--deadline", "0"], "argument --deadline: expected 1 to 3600 seconds, found 0"),
        (["--parallel.tensor", "3"], "a multiple of"),
        (["--parallel.tensro", "1"], "unknown key"),
    ],
)
def test_usage(data: Path, tmp_path: Path, more: list[str], message: str) -> None:
    code, lines, errors = run_alone(*arguments(data, tmp_path, *more))
    assert (code, lines) == (2, [])
    assert message in errors
