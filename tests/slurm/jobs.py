"""Submitting the shipped batch scripts to the test cluster, and what their jobs leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_qwenvl.config.load import dump_yaml
from tests.end_to_end.training_cases import run_config

from .cluster import Cluster

STEPS = ["import", "stage1", "next_stage2", "stage2", "next_stage3", "stage3", "export"]
ROOT = Path(__file__).parents[2]
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
"""In place of the eight GPU tasks per node of the scripts."""


def write_recipe(folder: Path, data: Path, stage: str, *overrides: str) -> Path:
    """A recipe file of a small run of `stage`."""
    config = run_config(
        data, folder / stage, "--data.workers", "1", "--train.steps", "40", "--checkpoint.interval", "16", *overrides,
        recipe=f"tiny_{stage}",
    )  # fmt: skip
    path = folder / f"{stage}.yaml"
    path.write_text(dump_yaml(config))
    return path


def write_site(folder: Path, text: str = "") -> Path:
    """A site file for the test cluster."""
    path = folder / "site.env"
    small = " ".join(SMALL)
    lines = [
        f"export SBATCH_PARTITION=main PYTHON={sys.executable} PYTHONWARNINGS=ignore",
        *(f"stage{number}_sbatch=({small})" for number in (1, 2, 3)),
        text,
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def submit(
    cluster: Cluster, site: Path, log: Path, script: str, *arguments: str, options: tuple[str, ...] = ()
) -> str:
    """Submit a script as a user does, from the repository; returns the job."""
    command = ["sbatch", "--parsable", f"--output={log}", *options, ROOT / "slurm" / script, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**cluster.environment, "SITE": str(site)}, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def pipeline(cluster: Cluster, site: Path, run: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Call slurm/submit_pipeline.sh."""
    command = [ROOT / "slurm/submit_pipeline.sh", run, "--site", site, *options]
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=300)


def status(cluster: Cluster, run: Path) -> str:
    """What slurm/status.sh shows."""
    done = subprocess.run(
        [ROOT / "slurm/status.sh", run], env=cluster.environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def first_line(log: Path) -> str:
    """Status of a job in its log."""
    return log.read_text().splitlines()[0].strip()


def chain_jobs(run: Path) -> dict[str, str]:
    """The last job of every step of a chain."""
    return {line.split("\t")[0]: line.split("\t")[1] for line in (run / "jobs.tsv").read_text().splitlines()}


def train_records(run_dir: Path) -> list[dict[str, Any]]:
    """All records of training steps as they were written, repeated steps included."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def wait_for_step(cluster: Cluster, job: str, run_dir: Path, step: int) -> None:
    """Wait until a run has logged a step (counted from 0)."""
    cluster.wait_while_alive(
        job,
        lambda: any(record["step"] >= step for record in train_records(run_dir)),
        f"{run_dir}: no step {step}",
    )


def ranks_of(run_dir: Path) -> dict[str, int]:
    """Process ids of the trainers of a run by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            variables = dict(
                v.split(b"=", 1) for v in (folder / "environ").read_bytes().split(b"\0") if b"=" in v
            )
        except OSError:
            continue
        if (
            b"megatron_qwenvl.train" in command
            and b"python" in command[0]
            and str(run_dir).encode() in command
        ):
            found[variables[b"SLURM_PROCID"].decode()] = int(folder.name)
    return found


def resolved(run_dir: Path) -> dict[str, Any]:
    """The configuration that was saved with a run."""
    return yaml.safe_load((run_dir / "config.yaml").read_text())


def site_of_chain(folder: Path, data: Path, published: Path) -> Path:
    """What each step is given; the recipes' run directories are the chain's."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"import_arguments=(import-qwenvl --from {published})"]
    for stage in ("stage1", "stage2", "stage3"):
        lines.append(f"{stage}_arguments=(--recipe {write_recipe(folder, data, stage)})")
    return write_site(folder, "\n".join(lines))


def finish_chain(cluster: Cluster, run: Path, *steps: str) -> None:
    """Wait until the jobs of the steps, by default of all, have finished well."""
    jobs = chain_jobs(run)
    assert list(jobs) == list(steps or STEPS)
    for step, job in jobs.items():
        state = cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED")
        log = run / "logs" / f"{step}-{job}.log"
        assert state == "COMPLETED", log.read_text() if log.exists() else state
        assert first_line(log).startswith(f"{step}: finished")


def restarts_of(cluster: Cluster, job: str) -> int:
    shown = cluster.run("scontrol", "--oneliner", "show", "job", job)
    return int(shown.split("Restarts=")[1].split()[0])
