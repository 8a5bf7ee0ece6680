"""Single jobs of the shipped scripts: what they compute, what they survive, and their messages when they fail."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights
from megatron_qwenvl.checkpoint.storage.manifest import read_manifest
from megatron_qwenvl.checkpoint.storage.run_folder import find_checkpoint

from .cluster import Cluster, wait_until
from .jobs import (
    ROOT,
    SMALL,
    first_line,
    pipeline,
    ranks_of,
    resolved,
    submit,
    train_records,
    wait_for_step,
    write_recipe,
    write_site,
)

pytestmark = pytest.mark.slurm


def finish(cluster: Cluster, job: str, log: Path, state: str = "COMPLETED") -> str:
    """Wait for the end of a job, which must be `state`; returns its log."""
    found = cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED")
    assert found == state, log.read_text() if log.exists() else found
    return log.read_text()


def test_two_nodes_with_two_tasks_equal_one_machine(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    layout = ("--parallel.tensor", "2", "--train.steps", "6")
    recipe, site, log = write_recipe(tmp_path, data, "stage1"), write_site(tmp_path), tmp_path / "log"
    job = submit(
        cluster, site, log, "stage1_pretrain.sbatch", "--recipe", str(recipe), *layout,
        options=("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"),
    )  # fmt: skip
    text = finish(cluster, job, log)
    assert first_line(log).startswith("stage1: finished")
    assert "preflight: passed" in text
    env = {**os.environ, "NPROC": "4", "PYTHON": sys.executable, "PYTHONWARNINGS": "ignore"}
    command = [ROOT / "launch/local.sh", "--recipe", recipe, "--run_dir", tmp_path / "local", *layout]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=1200)
    assert compare(open_weights(tmp_path / "stage1"), open_weights(tmp_path / "local")) == []
    assert [r["loss"] for r in train_records(tmp_path / "stage1")] == [
        r["loss"] for r in train_records(tmp_path / "local")
    ]
    check_what_is_saved_with_the_run(tmp_path / "stage1", job)


def check_what_is_saved_with_the_run(run_dir: Path, job: str) -> None:
    assert resolved(run_dir)["parallel"]["tensor"] == 2
    (path,) = (run_dir / "environment").iterdir()
    environment = json.loads(path.read_text())
    assert environment["variables"]["SLURM_JOB_ID"] == job
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if revision.returncode == 0:
        assert environment["git_revision"] == revision.stdout.strip()


@pytest.mark.parametrize("case", ["missing data", "run directory", "world size", "configuration"])
def test_what_cannot_work_is_one_clear_line_and_is_not_tried_again(
    cluster: Cluster, data: Path, tmp_path: Path, case: str
) -> None:
    recipe, site, log = write_recipe(tmp_path, data, "stage1"), write_site(tmp_path), tmp_path / "log"
    (tmp_path / "file").touch()
    overrides, said = {
        "missing data": (("--data.root", f"{tmp_path}/nowhere"), (f"{tmp_path}/nowhere",)),
        "run directory": (
            ("--run_dir", f"{tmp_path}/file/run"),
            ("run directory", f"{tmp_path}/file/run", "cannot be written"),
        ),
        "world size": (("--parallel.tensor", "4"), ("parallel.tensor", "multiple of 4", "found 2")),
        "configuration": (("--train.step", "4"), ("train.step: unknown key", "train.steps")),
    }[case]
    job = submit(
        cluster, site, log, "stage1_pretrain.sbatch", "--recipe", str(recipe), *overrides, options=SMALL
    )
    text = finish(cluster, job, log, "FAILED")
    status = first_line(log)
    assert status.startswith("stage1: FAILED: ")
    for part in said:
        assert part in status
    assert "Traceback" not in text
    assert text.count("=== attempt") == 1


def test_a_damaged_checkpoint_is_named_and_an_older_one_used(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    """And with no older one the job fails with a line that names it."""
    recipe, site, log = write_recipe(tmp_path, data, "stage1"), write_site(tmp_path), tmp_path / "log"
    saving = ("--train.steps", "4", "--checkpoint.interval", "2")
    submitted = ("stage1_pretrain.sbatch", "--recipe", str(recipe), *saving)
    finish(cluster, submit(cluster, site, log, *submitted, options=SMALL), log)
    newest = find_checkpoint(tmp_path / "stage1")
    flip_bit(newest / "model" / "__0_0.distcp")
    again = tmp_path / "again"
    text = finish(cluster, submit(cluster, site, again, *submitted, options=SMALL), again)
    assert f"damaged checkpoint: {newest}/model/__0_0.distcp" in text
    assert [record["step"] for record in train_records(tmp_path / "stage1")] == [0, 1, 2, 3, 2, 3]
    assert read_manifest(find_checkpoint(tmp_path / "stage1")).step == 4
    for checkpoint in (tmp_path / "stage1" / "checkpoints").glob("step_*"):
        flip_bit(checkpoint / "model" / "__0_0.distcp")
    third = tmp_path / "third"
    finish(cluster, submit(cluster, site, third, *submitted, options=SMALL), third, "FAILED")
    assert "checkpoints are damaged" in first_line(third)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_same_failure_twice_ends_the_job(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """A rank is killed before the first checkpoint, in every attempt."""
    recipe, site, log = write_recipe(tmp_path, data, "stage1"), write_site(tmp_path), tmp_path / "log"
    run_dir = tmp_path / "run"
    endless = ("--run_dir", str(run_dir), "--train.steps", "100000", "--checkpoint.interval", "0")
    job = submit(
        cluster, site, log, "stage1_pretrain.sbatch", "--recipe", str(recipe), *endless, options=SMALL
    )
    killed: set[int] = set()
    for _ in range(2):
        killed.add(kill_rank_1(cluster, job, run_dir, killed))
    text = finish(cluster, job, log, "FAILED")
    assert text.count("=== attempt") == 2
    assert "task 1: Killed" in first_line(log) and "same failure twice" in first_line(log)
    assert "FAILED (lost peer)" in text


def kill_rank_1(cluster: Cluster, job: str, run_dir: Path, killed: set[int]) -> int:
    """Kill -9 rank 1 of the attempt after those of `killed`, some steps into it; returns its process."""
    cluster.wait_while_alive(
        job,
        lambda: ranks_of(run_dir).keys() == {"0", "1"} and ranks_of(run_dir)["1"] not in killed,
        "no ranks",
    )
    seen = len(train_records(run_dir))
    cluster.wait_while_alive(job, lambda: len(train_records(run_dir)) > seen + 2, "no steps")
    rank = ranks_of(run_dir)["1"]
    os.kill(rank, signal.SIGKILL)
    return rank


def test_a_node_that_fails_preflight_is_excluded(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """One of three nodes has another version of a package; the job goes on with the fourth node in its place."""
    recipe, log = write_recipe(tmp_path, data, "stage1"), tmp_path / "log"
    site = write_site(tmp_path, f"export PYTHON={odd_python(tmp_path, 'node2')}")
    job = submit(
        cluster, site, log, "stage1_pretrain.sbatch", "--recipe", str(recipe), "--train.steps", "3",
        "--data.global_batch_size", "9", options=("--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=1"),
    )  # fmt: skip
    text = finish(cluster, job, log)
    assert "preflight: FAILED" in text and "excluded from now on: node2" in text
    attempts = [line for line in text.splitlines() if line.startswith("=== attempt")]
    assert len(attempts) == 2 and "node[1-3]" in attempts[0] and "node[1,3-4]" in attempts[1]
    assert read_manifest(find_checkpoint(tmp_path / "stage1")).step == 3


def odd_python(folder: Path, node: str) -> Path:
    """An interpreter that sees another version of tiktoken on one node."""
    odd = folder / "odd" / "tiktoken-0.1.dist-info"
    odd.mkdir(parents=True)
    (odd / "METADATA").write_text("Metadata-Version: 2.1\nName: tiktoken\nVersion: 0.1\n")
    python = folder / "python"
    python.write_text(
        f'#!/bin/bash\n[[ "$SLURMD_NODENAME" != {node} ]] || export PYTHONPATH={odd.parent}:$PYTHONPATH\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


def test_cancelling_a_job_does_not_start_it_again(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    recipe, site, log = write_recipe(tmp_path, data, "stage1"), write_site(tmp_path), tmp_path / "log"
    job = submit(
        cluster, site, log, "stage1_pretrain.sbatch", "--recipe", str(recipe), "--train.steps", "100000", options=SMALL
    )  # fmt: skip
    wait_for_step(cluster, job, tmp_path / "stage1", 5)
    cluster.run("scancel", job)
    assert cluster.wait_for_state(job, "CANCELLED", "COMPLETED", "FAILED", "PENDING") == "CANCELLED"
    wait_until(lambda: "stopped by Slurm" in first_line(log), "the log does not say so")
    saved = read_manifest(find_checkpoint(tmp_path / "stage1")).step
    assert saved == train_records(tmp_path / "stage1")[-1]["step"] + 1


@pytest.mark.parametrize("options", [("--batch",), ("--full",), ()])
def test_the_notice_of_a_time_limit_saves_wherever_it_is_sent(
    cluster: Cluster, data: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """To the batch shell, as the scripts ask for; to all of the job; to its steps alone."""
    recipe, site, log = write_recipe(tmp_path, data, "stage1"), write_site(tmp_path), tmp_path / "log"
    job = submit(
        cluster, site, log, "stage1_pretrain.sbatch", "--recipe", str(recipe), "--train.steps", "100000", options=SMALL
    )  # fmt: skip
    wait_for_step(cluster, job, tmp_path / "stage1", 3)
    cluster.run("scancel", "--signal=USR1", *options, job)
    cluster.wait_while_alive(job, lambda: "=== to be started again" in log.read_text(), "not started again")
    assert "=== to be started again: interrupted, saved as step_" in log.read_text()
    cluster.run("scancel", job)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("export SBATCH_PARTITION=nowhere", "invalid partition specified: nowhere"),
        ("export SBATCH_PARTITION=closed SBATCH_ACCOUNT=stranger", "account"),
    ],
)
def test_a_wrong_partition_or_account_is_one_line(
    cluster: Cluster, data: Path, tmp_path: Path, setting: str, said: str
) -> None:
    site = write_site(tmp_path, f"import_arguments=(import-qwenvl --from {tmp_path})\n{setting}")
    done = pipeline(cluster, site, tmp_path / "run")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr and str(site) in done.stderr


def test_profile_throughput_writes_its_table(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    recipe, site, log = write_recipe(tmp_path, data, "stage1"), write_site(tmp_path), tmp_path / "log"
    job = submit(
        cluster, site, log, "profile_throughput.sbatch", "--recipe", str(recipe), "--out", str(tmp_path / "table"),
        "--steps", "3", "--warmup", "1", "--layout", "parallel.tensor=1", "--layout", "parallel.tensor=2",
        options=("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1"),
    )  # fmt: skip
    finish(cluster, job, log)
    table = json.loads((tmp_path / "table" / "throughput.json").read_text())
    assert len(table["layouts"]) == 2
    assert (tmp_path / "table" / "throughput.md").read_text().count("parallel.tensor=") >= 2


def test_prepare_data_indexes_and_leaves_what_is_indexed(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    site = write_site(tmp_path)
    source = tmp_path / "copy"
    source.mkdir()
    for shard in (data / "mixed").glob("*.tar"):
        (source / shard.name).write_bytes(shard.read_bytes())
    for number, fresh in ((1, 3), (2, 0)):
        log = tmp_path / f"log{number}"
        job = submit(
            cluster, site, log, "prepare_data.sbatch", str(source), options=("--cpus-per-task=2", "--mem=1G")
        )
        assert f"({fresh} indexed now)" in finish(cluster, job, log)
