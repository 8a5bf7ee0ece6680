"""A chain under faults at random times ends with the weights of the undisturbed one, bit for bit.

    SLURM_FAULTS=30 python -m pytest -m slurm tests/slurm/test_faults.py -k whole    # the long one, by hand

SLURM_FAULT_SEED chooses other faults; which ones hit is printed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights

from .cluster import Cluster
from .faults import Faults, disturb_chain
from .jobs import (
    chain_jobs,
    finish_chain,
    first_line,
    pipeline,
    restarts_of,
    site_of_chain,
    status,
    train_records,
)

pytestmark = pytest.mark.slurm
COUNT = int(os.environ.get("SLURM_FAULTS", "0"))
SEED = int(os.environ.get("SLURM_FAULT_SEED", "1"))


def test_signals_and_an_absent_controller_end_no_stage(
    cluster: Cluster, undisturbed: Path, data: Path, published: Path, tmp_path: Path
) -> None:
    """The notice of a time limit before the first step twice, signals to ranks that start, the controller away when
    the job wants to be started again, the shell killed: the next call of the chain goes on to the same weights."""
    site, run = site_of_chain(tmp_path, data, published), tmp_path / "run"
    assert pipeline(cluster, site, run, "--to", "next_stage2").returncode == 0
    job, faults = chain_jobs(run)["stage1"], Faults(cluster, SEED)

    log, records = run / "logs" / f"stage1-{job}.log", lambda: len(train_records(run / "stage1"))

    def wait_for_attempt() -> None:
        def begun() -> bool:
            return log.exists() and log.read_text().count("=== attempt") == restarts_of(cluster, job) + 1

        cluster.wait_while_alive(job, begun, "no attempt begins")

    def disturb(kind: str, *more: str) -> None:
        before = restarts_of(cluster, job)
        cluster.wait_while_alive(job, lambda: faults.one(kind, job), f"nothing to hit with {kind}")
        for other in more:
            faults.one(other, job)
        cluster.wait_while_alive(
            job, lambda: restarts_of(cluster, job) > before, f"not started again after {kind}"
        )
        wait_for_attempt()

    wait_for_attempt()
    disturb("shell USR1", "time limit")  # while it asks for the configuration or looks at the machines
    disturb("shell TERM", "steps USR1")
    disturb("rank TERM", "rank USR1")
    seen = records()
    cluster.wait_while_alive(job, lambda: records() > seen + 1, "no steps")
    disturb("shell USR1, controller away")
    assert not (run / "stage1" / "failures.tsv").exists()
    seen = records()
    cluster.wait_while_alive(job, lambda: records() > seen + 1, "no steps")
    assert faults.one("shell KILL", job)
    assert cluster.wait_for_state(job, "FAILED") == "FAILED"
    assert "ENDED unexpectedly; Slurm says FAILED, exit code 0:9" in status(cluster, run)
    again = pipeline(cluster, site, run, "--to", "next_stage2")
    assert f"stage1: job {job} ended unexpectedly" in again.stdout
    finish_chain(cluster, run, "import", "stage1", "next_stage2")
    assert (
        compare(
            open_weights(run / "weights/stage2_start"), open_weights(undisturbed / "weights/stage2_start")
        )
        == []
    )
    losses = {record["step"]: record["loss"] for record in train_records(undisturbed / "stage1")}
    assert all(record["loss"] == losses[record["step"]] for record in train_records(run / "stage1"))
    repeat_a_finished_conversion(cluster, run)


def repeat_a_finished_conversion(cluster: Cluster, run: Path) -> None:
    """A job that is requeued after its result was in place finishes well."""
    job = chain_jobs(run)["next_stage2"]
    cluster.run("scontrol", "requeue", job)
    log = run / "logs" / f"next_stage2-{job}.log"
    cluster.wait_while_alive(job, lambda: log.read_text().count("=== attempt") == 2, "not started again")
    assert cluster.wait_for_state(job, "COMPLETED") == "COMPLETED"
    assert "complete, made before by the same command" in log.read_text()
    assert first_line(log).startswith("next_stage2: finished")


@pytest.mark.skipif(COUNT == 0, reason="SLURM_FAULTS=30 runs it; takes half an hour on an idle machine")
@pytest.mark.timeout(4 * 3600)
def test_a_whole_chain_under_random_faults(
    cluster: Cluster, undisturbed: Path, data: Path, published: Path, tmp_path: Path
) -> None:
    site, run = site_of_chain(tmp_path, data, published), tmp_path / "run"
    faults = Faults(cluster, SEED)
    try:
        disturb_chain(cluster, site, run, faults, COUNT)
    finally:
        print("\n".join(faults.done))
    for stage in ("stage1", "stage2", "stage3"):
        assert compare(open_weights(run / stage), open_weights(undisturbed / stage)) == []
    for file in (undisturbed / "export").glob("*.safetensors"):
        assert (run / "export" / file.name).read_bytes() == file.read_bytes()
