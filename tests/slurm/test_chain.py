"""The whole chain from published weights to an export, undisturbed and with everything that happens on a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .cluster import Cluster
from .jobs import (
    STEPS,
    chain_jobs,
    finish_chain,
    pipeline,
    ranks_of,
    restarts_of,
    site_of_chain,
    status,
    train_records,
    wait_for_step,
)

pytestmark = pytest.mark.slurm


def same_files(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    return names == sorted(path.name for path in b.iterdir()) and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names
    )


def test_the_chain_runs_through(cluster: Cluster, undisturbed: Path, data: Path, published: Path) -> None:
    for stage in ("stage1", "stage2", "stage3"):
        assert [record["step"] for record in train_records(undisturbed / stage)] == list(range(40))
    assert (undisturbed / "export" / "model.safetensors.index.json").is_file()
    assert not same_files(undisturbed / "export", published)
    shown = status(cluster, undisturbed).splitlines()
    assert [line.split()[0] for line in shown] == STEPS
    assert all("FINISHED" in line for line in shown)
    again = pipeline(cluster, undisturbed.parent / "site.env", undisturbed)
    assert again.returncode == 0
    assert [line.split(": ")[1].split()[0] for line in again.stdout.splitlines()] == ["finished"] * 7
    assert len((undisturbed / "jobs.tsv").read_text().splitlines()) == 7


def test_disturbances_change_nothing(
    cluster: Cluster, undisturbed: Path, data: Path, published: Path, tmp_path: Path
) -> None:
    """A requeue, the signal ahead of a time limit, a killed rank, a lost and a drained node: the exported weights are
    the same bit for bit, no step is missing, and none is repeated beyond the newest save."""
    site, run = site_of_chain(tmp_path, data, published), tmp_path / "run"
    assert pipeline(cluster, site, run).returncode == 0
    jobs = chain_jobs(run)

    def disturb(stage: str, step: int, action: Callable[[], object]) -> None:
        wait_for_step(cluster, jobs[stage], run / stage, step)
        restarts = restarts_of(cluster, jobs[stage])
        action()
        cluster.wait_while_alive(
            jobs[stage], lambda: restarts_of(cluster, jobs[stage]) > restarts, f"{stage} is not started again"
        )

    disturb("stage1", 4, lambda: cluster.run("scontrol", "requeue", jobs["stage1"]))
    disturb("stage1", 24, lambda: cluster.run("scancel", "--signal=USR1", jobs["stage1"]))
    disturb("stage2", 20, lambda: os.kill(ranks_of(run / "stage2")["1"], signal.SIGKILL))
    assert "Killed" in (run / "stage2" / "failures.tsv").read_text()

    def lose_node() -> None:
        cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")

    disturb("stage3", 6, lose_node)
    cluster.run("scontrol", "update", "nodename=node1", "state=drain", "reason=test")
    finish_chain(cluster, run)
    for node in ("node1", "node2"):  # a lost node may have come back by itself
        cluster.try_run("scontrol", "update", f"nodename={node}", "state=resume")

    assert same_files(run / "export", undisturbed / "export")
    for stage in ("stage1", "stage2", "stage3"):
        check_steps(run / stage, undisturbed / stage)


def check_steps(disturbed: Path, undisturbed: Path) -> None:
    """Every step is there with the same loss; one that was repeated came after the newest save before the break."""
    losses = {record["step"]: record["loss"] for record in train_records(undisturbed)}
    before = -1
    for record in train_records(disturbed):
        step = record["step"]
        assert record["loss"] == losses[step]
        if step != before + 1:
            assert step <= before and step % 16 == 0, f"step {step} after step {before}"
        before = step
    assert before == 39


def test_a_failed_step_stops_the_chain_and_the_next_call_goes_on(
    cluster: Cluster, data: Path, published: Path, tmp_path: Path
) -> None:
    site, run = site_of_chain(tmp_path, data, published), tmp_path / "run"
    good = site.read_text()
    site.write_text(good + f"stage1_arguments+=(--data.root {tmp_path}/nowhere)\n")
    assert pipeline(cluster, site, run, "--to", "next_stage2").returncode == 0
    jobs = chain_jobs(run)
    assert cluster.wait_for_state(jobs["stage1"], "COMPLETED", "FAILED") == "FAILED"
    assert cluster.wait_for_state(jobs["next_stage2"], "CANCELLED") == "CANCELLED"
    shown = status(cluster, run)
    assert f"{tmp_path}/nowhere" in shown and "FAILED" in shown and "CANCELLED before it started" in shown
    site.write_text(good)
    again = pipeline(cluster, site, run, "--to", "stage1", "--", "--train.steps", "3")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("import: finished")
    job = chain_jobs(run)["stage1"]
    assert job != jobs["stage1"]
    kept = pipeline(cluster, site, run, "--to", "stage1", "--", "--train.steps", "3")
    assert f"stage1: job {job} is queued or running" in kept.stdout
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED") == "COMPLETED"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--from", "stage2"), "stage2 starts from"),
        (("--from", "stage9"), "unknown step stage9"),
        (("--from", "export", "--to", "import"), "comes after"),
        (("--fast",), "unknown option --fast"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(
    cluster: Cluster, data: Path, published: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done: subprocess.CompletedProcess[str] = pipeline(
        cluster, site_of_chain(tmp_path, data, published), tmp_path / "run", *options
    )
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
