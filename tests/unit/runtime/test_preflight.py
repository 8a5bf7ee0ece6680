"""What is concluded from the ranks' reports; nothing is measured here but the matrix product."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch

from megatron_qwenvl.preflight import placement, probes, rules
from megatron_qwenvl.preflight.placement import RankPlacement, place_ranks
from megatron_qwenvl.preflight.probes import (
    DirectoryReport,
    MachineReport,
    NetworkReport,
    ProbeTimeoutError,
    hadamard,
    multiply,
    run_with_timeout,
)
from megatron_qwenvl.preflight.rules import Finding, node_failure, ok, run_failure, warning
from megatron_qwenvl.preflight.verdict import (
    assess_machines,
    assess_network,
    assess_run_directory,
    bad_nodes,
    can_form_group,
    describe_bandwidth,
    exit_code,
)
from megatron_qwenvl.runtime.processes import ProcessInfo, expand_counts

FOUR = {0: "a", 1: "a", 2: "b", 3: "b"}
SIX = {**FOUR, 4: "c", 5: "c"}
GOOD = MachineReport(device="cpu", kernels="torch", seconds=0.01)


def failed(findings: list[Finding]) -> list[str | None]:
    return [finding.node for finding in findings if finding.level == "failure"]


def judged(machines: dict[int, MachineReport], nodes: dict[int, str] = SIX) -> list[Finding]:
    return assess_machines(machines, nodes, 2.0, "warning")


# --- verdicts


def test_nodes_at_fault_come_before_the_run() -> None:
    run, node = run_failure("data", "gone"), node_failure("device", "gone", "b")
    assert exit_code([ok("a", "b"), warning("a", "b", "c")]) == 0
    assert exit_code([run]) == 1
    assert exit_code([run, node]) == 3
    assert bad_nodes([run, node, warning("a", "b", "c")]) == ["b"]


def test_an_unknown_bad_node_has_no_name_but_its_code() -> None:
    finding = node_failure("ranks", "rank 5 did not report", None)
    assert exit_code([finding]) == 3
    assert bad_nodes([finding]) == []


def test_what_is_wrong_everywhere_is_the_runs_fault() -> None:
    everywhere = rules.attribute_problems("run directory", {0: "no", 2: "no", 4: "no"}, SIX)
    assert exit_code(everywhere) == 1
    assert "all 3 nodes" in everywhere[0].text
    assert failed(rules.attribute_problems("run directory", {0: "no", 2: "no"}, SIX)) == ["a", "b"]


def test_one_node_by_itself() -> None:
    alone = {0: "a", 1: "a"}
    assert exit_code(rules.attribute_problems("run directory", {0: "no"}, alone)) == 1
    assert failed(rules.attribute_problems("device", {0: "no"}, alone, alone="node")) == ["a"]


# --- ranks that do not come


def process(launcher: str = "torchrun", world: int = 6) -> ProcessInfo:
    return ProcessInfo(0, world, 0, 2, "tcp://a:1", launcher)


def test_a_missing_rank_is_placed_beside_its_neighbour() -> None:
    placements = {rank: RankPlacement(SIX[rank], rank % 2, 2) for rank in (0, 1, 2)}
    places = place_ranks(process(), placements)
    findings = rules.missing_ranks(6, {0: "a", 1: "a", 2: "b"}, places, 30)
    assert [(finding.node, finding.text) for finding in findings] == [
        ("b", "rank 3 did not report within 30 s"),
        (None, "ranks 4, 5 did not report within 30 s"),
    ]
    assert exit_code(findings) == 3


def test_neighbours_are_not_guessed_where_ranks_go_round_the_nodes() -> None:
    placements = {0: RankPlacement("a", 0, 2), 2: RankPlacement("a", 1, 2), 3: RankPlacement("b", 1, 2)}
    assert place_ranks(process(world=4), placements) == {0: "a", 2: "a", 3: "b"}


def test_slurm_says_where_a_whole_missing_node_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_host_names", lambda listed: ["a", "b", "c"])
    monkeypatch.setenv("SLURM_STEP_NODELIST", "[a-c]")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x3)")
    placements = {0: RankPlacement("a", 0, 2), 3: RankPlacement("b", 1, 2)}
    assert place_ranks(process("slurm"), placements) == SIX
    # A rank that sits elsewhere than expected: Slurm placed them otherwise.
    assert place_ranks(process("slurm"), {0: RankPlacement("a", 0, 1), 1: RankPlacement("b", 0, 1)}) == {
        0: "a",
        1: "b",
    }


@pytest.mark.parametrize(("text", "counts"), [("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("", []), ("x", [])])
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


# --- facts


def test_the_odd_node_out_is_named() -> None:
    facts = {rank: {"torch": "2.13", "driver": "580"} for rank in SIX}
    facts[2] = {"torch": "2.12", "driver": "580"}
    (finding,) = rules.differing_facts("versions", facts, SIX)
    assert finding.node == "b"
    assert finding.text == "torch: expected 2.13 as on 5 of 6 ranks, found 2.12 (rank 2)"


def test_rank_0_may_be_the_odd_one() -> None:
    facts = {rank: {"torch": "2.12" if SIX[rank] == "a" else "2.13"} for rank in SIX}
    assert failed(rules.differing_facts("versions", facts, SIX)) == ["a"]


def test_in_a_tie_rank_0_is_right() -> None:
    facts = {rank: {"torch": "2.13" if FOUR[rank] == "a" else "2.12"} for rank in FOUR}
    assert failed(rules.differing_facts("versions", facts, FOUR)) == ["b"]


def test_a_package_that_is_missing_on_a_node_differs() -> None:
    facts = {rank: {"torch": "2.13", "apex": "0.1"} for rank in FOUR} | {3: {"torch": "2.13"}}
    (finding,) = rules.differing_facts("versions", facts, FOUR)
    assert "apex: expected 0.1" in finding.text and "found none (rank 3)" in finding.text


# --- machines


def test_equal_machines_pass() -> None:
    assert {finding.level for finding in judged(dict.fromkeys(SIX, GOOD))} == {"ok"}


def test_a_wrong_product_is_a_broken_node() -> None:
    wrong = MachineReport(device="cpu", kernels="torch", seconds=0.01, wrong=7)
    assert failed(judged({**dict.fromkeys(SIX, GOOD), 3: wrong})) == ["b"]


def test_a_slow_node_is_named_and_may_stay() -> None:
    machines = {**dict.fromkeys(SIX, GOOD), 4: MachineReport(device="cpu", kernels="torch", seconds=0.021)}
    (slow,) = (finding for finding in judged(machines) if finding.level != "ok")
    assert (slow.level, slow.node) == ("warning", "c")
    assert failed(assess_machines(machines, SIX, 2.0, "failure")) == ["c"]
    assert not failed(assess_machines(machines, SIX, 2.2, "failure"))


def test_a_node_without_its_gpu() -> None:
    gpu = MachineReport(device="cuda", gpu="H100", kernels="te", seconds=0.01, free_bytes=79, total_bytes=80)
    gpus = {rank: MachineReport(**{**vars(gpu), "gpu_identity": str(rank)}) for rank in SIX}
    assert {finding.level for finding in judged(gpus)} == {"ok"}
    lost = {**gpus, 2: MachineReport(device_problem="no GPU is visible")}
    assert failed(judged(lost)) == ["b"]
    assert not can_form_group(lost)
    fallen_back = {**gpus, 2: GOOD}
    assert set(failed(judged(fallen_back))) == {"b"}
    assert not can_form_group(fallen_back)


def test_occupied_memory_is_told_and_a_shared_gpu_refused() -> None:
    def gpu(identity: str, free: int) -> MachineReport:
        return MachineReport("cuda", "H100", identity, free, 80, "te", 0.01)

    occupied = judged({0: gpu("x", 79), 1: gpu("y", 40)}, {0: "a", 1: "a"})
    assert [(finding.level, finding.node) for finding in occupied if finding.level != "ok"] == [
        ("warning", "a")
    ]
    shared = judged({0: gpu("x", 79), 1: gpu("x", 79)}, {0: "a", 1: "a"})
    assert exit_code(shared) == 1
    assert "ranks 0, 1 on a have one GPU" in shared[0].text


def test_kernels_that_no_node_has_are_the_runs_fault() -> None:
    without = MachineReport(device="cpu", seconds=0.01, kernel_problem="te cannot be used")
    assert exit_code(judged(dict.fromkeys(SIX, without))) == 1
    assert failed(judged({**dict.fromkeys(SIX, GOOD), 5: without})) == ["c"]


def test_a_hadamard_matrix_has_orthogonal_rows_and_faults_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    matrix = hadamard(64, cpu, torch.float32)
    assert torch.equal(matrix @ matrix.t(), 64 * torch.eye(64))
    assert multiply(cpu)[1] == 0

    def faulty(side: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        broken = hadamard(side, device, dtype)
        broken[3, 5] = float("nan")
        return broken

    monkeypatch.setattr(probes, "hadamard", faulty)
    side = probes.MATRIX_SIDE["cpu"]
    assert multiply(cpu)[1] == 2 * side - 1  # a row and a column


# --- files


def test_a_node_that_cannot_write() -> None:
    written = {rank: DirectoryReport("read-only" if SIX[rank] == "c" else "") for rank in SIX}
    assert failed(assess_run_directory(written, SIX)) == ["c"]
    nowhere = assess_run_directory({rank: DirectoryReport("read-only") for rank in SIX}, SIX)
    assert exit_code(nowhere) == 1


def test_a_node_that_lacks_a_path() -> None:
    written = {rank: DirectoryReport("", ("/data",) if SIX[rank] == "b" else ()) for rank in SIX}
    assert failed(assess_run_directory(written, SIX)) == ["b"]
    assert assess_run_directory({rank: DirectoryReport("", ("/data",)) for rank in SIX}, SIX) == []


def test_a_node_with_a_directory_of_its_own_is_named() -> None:
    seen = {rank: [other for other in SIX if (SIX[other] == "b") == (SIX[rank] == "b")] for rank in SIX}
    (finding,) = rules.unshared_directory(seen, SIX, "run")
    assert finding.node == "b"
    assert "found those of ranks 2, 3" in finding.text


def test_a_node_that_does_not_see_the_others_or_is_not_seen() -> None:
    everything = list(SIX)
    blind = {rank: everything if SIX[rank] != "b" else [2, 3] for rank in SIX}
    assert failed(rules.unshared_directory(blind, SIX, "run")) == ["b"]
    unseen = {rank: everything if SIX[rank] == "b" else [0, 1, 4, 5] for rank in SIX}
    assert failed(rules.unshared_directory(unseen, SIX, "run")) == ["b"]
    assert rules.unshared_directory(dict.fromkeys(SIX, everything), SIX, "run") == []
    assert rules.unshared_directory({}, SIX, "run") == [], "no rank could write, which is told elsewhere"


def test_a_directory_that_no_node_shares_is_the_runs_fault() -> None:
    seen = {rank: [other for other in SIX if SIX[other] == SIX[rank]] for rank in SIX}
    (finding,) = rules.unshared_directory(seen, SIX, "/tmp/run")
    assert exit_code([finding]) == 1
    assert "every node sees its own files only" in finding.text


@pytest.mark.parametrize(
    ("free", "level"), [(99, "failure"), (100, "warning"), (399, "warning"), (400, "ok")]
)
def test_space_for_the_next_checkpoints(free: int, level: str) -> None:
    finding = rules.free_space(free, checkpoint_bytes=100, wanted=4, directory="run")
    assert finding.level == level
    assert not finding.node_fault


# --- network


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_every_link_of_the_ring_is_measured_once_and_alone(count: int) -> None:
    nodes = [f"n{i}" for i in range(count)]
    rounds = rules.link_rounds(nodes)
    for pairs in rounds:
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
    links = [frozenset(pair) for pairs in rounds for pair in pairs]
    ring = {frozenset(pair) for pair in pairwise([*nodes, nodes[0]]) if len(set(pair)) == 2}
    assert set(links) == ring
    assert len(links) == len(ring)


@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_node_whose_links_are_slow_is_named_and_its_neighbours_are_not(count: int) -> None:
    nodes = [f"n{i}" for i in range(count)]
    links = [pair for pairs in rules.link_rounds(nodes) for pair in pairs]
    bandwidths = {link: 4e9 if "n1" in link else 10e9 for link in links}
    (finding,) = rules.slow_links(bandwidths, 2.0, "warning")
    assert (finding.level, finding.node) == ("warning", "n1")
    assert rules.slow_links(bandwidths, 3.0, "warning") == []


def test_one_slow_link_between_good_nodes_names_nobody() -> None:
    nodes = list("abcd")
    links = [pair for pairs in rules.link_rounds(nodes) for pair in pairs]
    assert (
        rules.slow_links({link: 1e9 if link == ("a", "b") else 1e10 for link in links}, 2.0, "failure") == []
    )
    assert rules.slow_links({("a", "b"): 1.0}, 2.0, "failure") == []


def test_who_fails_first_is_named_and_who_fails_later_is_not() -> None:
    reports = {rank: NetworkReport(phase=2, problem="all-reduce: timed out") for rank in SIX}
    everywhere = assess_network(reports, "cpu", SIX, 2.0, "warning")
    assert [(finding.node, finding.node_fault) for finding in everywhere] == [(None, True)]
    reports[3] = NetworkReport(phase=0, problem="joining: refused")
    (finding,) = assess_network(reports, "cpu", SIX, 2.0, "warning")
    assert (finding.node, finding.text) == ("b", "joining: refused (rank 3)")


def test_a_wrong_sum() -> None:
    right, wrong = NetworkReport(phase=2, seconds=0.01), NetworkReport(phase=2, seconds=0.01, wrong=3)
    assert failed(assess_network({**dict.fromkeys(SIX, right), 4: wrong}, "cpu", SIX, 2.0, "warning")) == [
        "c"
    ]
    everywhere = assess_network(dict.fromkeys(SIX, wrong), "cpu", SIX, 2.0, "warning")
    assert (failed(everywhere), exit_code(everywhere)) == ([None], 3)


def test_bandwidths_of_an_all_reduce() -> None:
    text = describe_bandwidth(size=1_000_000_000, seconds=0.1, ranks=8)
    assert "algorithm bandwidth 10.00 GB/s" in text
    assert "bus bandwidth 17.50 GB/s" in text


# --- time


def test_what_hangs_is_left_behind() -> None:
    release = threading.Event()
    with pytest.raises(ProbeTimeoutError, match="not finished within 0 s"):
        run_with_timeout(0.05, release.wait)
    release.set()
    assert run_with_timeout(5, lambda: 7) == 7
    with pytest.raises(FileNotFoundError):
        run_with_timeout(5, lambda: open("/nonexistent/file"))
