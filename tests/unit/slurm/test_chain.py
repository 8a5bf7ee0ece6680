"""Submitting a chain and showing its progress, while Slurm answers and while it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from .stand_ins import Site
from .test_jobs import AWAY

LIVE = '[[ "$*" != *--name=* ]] || { echo "JOBID|COMMENT"; exit; }; '


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Accepts jobs as 101, 102, ...; nothing is in the queue."""
    site = Site(tmp_path)
    (tmp_path / "site.env").write_text("import_arguments=(import-qwenvl --from 'a b')\n")
    site.does(
        "sbatch", 'printf "%s\\0" "$@" >"$HERE/submitted"; echo $((100 + $(grep -c ^sbatch "$HERE/clients")))'
    )
    site.does("squeue", LIVE + 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    return site


def submit(site: Site, *options: str):
    return site.tool(
        "submit_pipeline.sh", str(site.run_dir), "--site", str(site.folder / "site.env"), *options
    )


def test_a_chain_in_a_place_with_an_odd_name(site: Site) -> None:
    site.run_dir = site.folder / "100% of 'it' #1 %j"
    hard = ["--data.root", 'x "y" $z * \n#', "--seed=3"]
    done = submit(site, "--to", "stage1", "--", *hard)
    assert done.returncode == 0, done.stderr
    submitted = (site.folder / "submitted").read_text().split("\0")
    assert f"--output={site.folder}/100%% of 'it' #1 %%j/logs/%x-%j.log" in submitted
    assert submitted[-4:-1] == hard and "--dependency=afterok:101" in submitted


def test_the_dashed_spelling_of_an_option_works_with_a_warning(site: Site) -> None:
    for option, warned in (("--dry_run", ""), ("--dry-run", "--dry-run is written --dry_run; ")):
        done = submit(site, "--to", "import", option)
        assert done.returncode == 0 and (warned in done.stderr if warned else not done.stderr)
    assert not any(call.startswith("sbatch") for call in site.clients)


@pytest.mark.parametrize("squeue", [AWAY, "exit 1", "exit 0"])
def test_nothing_is_submitted_twice_because_slurm_cannot_be_asked(site: Site, squeue: str) -> None:
    assert submit(site, "--to", "import").returncode == 0
    site.does("squeue", squeue)
    done = submit(site, "--to", "import")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "Slurm cannot be asked about job 101 of import" in line
    assert sum(call.startswith("sbatch") for call in site.clients) == 1


def test_a_job_that_slurm_took_without_an_answer_is_found(site: Site) -> None:
    site.does(
        "sbatch",
        "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv' >&2; exit 1",
    )
    found = f'echo "55|chain {site.run_dir}"'
    site.does("squeue", f'echo "JOBID|COMMENT"; ! grep -q ^sbatch "$HERE/clients" || {found}')
    done = submit(site, "--to", "import")
    assert done.returncode == 0, done.stderr
    assert "import: submitted as job 55" in done.stdout
    assert sum(call.startswith("sbatch") for call in site.clients) == 1


def test_sbatch_is_tried_again_and_then_says_that_slurm_is_out_of_reach(site: Site) -> None:
    site.does("sbatch", AWAY.replace("slurm_load_jobs", "sbatch:"))
    done = submit(site, "--to", "import")
    assert done.returncode == 2 and "out of reach" in done.stderr and "call again" in done.stderr
    assert sum(call.startswith("sbatch") for call in site.clients) == 5
    site.does("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    done = submit(site, "--to", "import")
    assert done.returncode == 2 and "invalid partition specified: x" in done.stderr
    assert sum(call.startswith("sbatch") for call in site.clients) == 6


@pytest.mark.parametrize(
    ("own", "accepted"),
    [
        (["--checkpoint.init_from", "w"], True),
        (["--checkpoint.init_from=w"], True),
        (["--data.root", "x --checkpoint.init_from y"], False),
    ],
)
def test_where_a_stage_starts_is_read_from_options_not_from_values(
    site: Site, own: list[str], accepted: bool
) -> None:
    done = submit(site, "--from", "stage2", "--to", "stage2", "--", *own)
    assert (done.returncode == 0) == accepted
    assert accepted or "stage2 starts from" in done.stderr


def chain_of_one(site: Site, first_line: str) -> None:
    logs = site.run_dir / "logs"
    logs.mkdir()
    (logs / "stage1-9.log").write_text(f"stage1: {first_line}\n")
    (site.run_dir / "jobs.tsv").write_text("stage1\t9\t2026-01-01\n")


ENDED_UNEXPECTEDLY = "running since 2026-01-01 10:00:00, attempt 2"


def test_status_reports_a_job_that_ended_unexpectedly(site: Site) -> None:
    chain_of_one(site, ENDED_UNEXPECTEDLY)
    site.does("squeue", "echo FAILED")
    site.does("scontrol", 'echo "JobId=9 JobState=FAILED Reason=x ExitCode=0:9 y=z"')
    shown = site.tool("status.sh", str(site.run_dir)).stdout
    assert "ENDED unexpectedly; Slurm says FAILED, exit code 0:9" in shown
    site.does("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    site.does("sacct", 'echo "NODE_FAIL|0:0"')
    site.does("squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    shown = site.tool("status.sh", str(site.run_dir)).stdout
    assert "ENDED unexpectedly; Slurm says NODE_FAIL, exit code 0:0" in shown
    site.does("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert "nothing about it any more" in site.tool("status.sh", str(site.run_dir)).stdout


def test_the_next_call_of_the_chain_reports_it_too(site: Site) -> None:
    chain_of_one(site, ENDED_UNEXPECTEDLY)
    (site.run_dir / "weights/stage1_start").mkdir(parents=True)
    done = submit(site, "--from", "stage1", "--to", "stage1")
    assert done.returncode == 0, done.stderr
    assert "stage1: job 9 ended unexpectedly" in done.stdout and "submitted as job 101" in done.stdout


def test_scontrol_answers_where_squeue_does_not(site: Site) -> None:
    chain_of_one(site, ENDED_UNEXPECTEDLY)
    site.does("squeue", "exit 0")
    site.does("scontrol", 'echo "JobId=9 JobState=NODE_FAIL Reason=x ExitCode=0:0 y=z"')
    shown = site.tool("status.sh", str(site.run_dir)).stdout
    assert "ENDED unexpectedly; Slurm says NODE_FAIL, exit code 0:0" in shown


@pytest.mark.parametrize("squeue", [AWAY, "exit 1"])
def test_status_does_not_guess(site: Site, squeue: str) -> None:
    chain_of_one(site, ENDED_UNEXPECTEDLY)
    site.does("squeue", squeue)
    done = site.tool("status.sh", str(site.run_dir))
    assert done.returncode == 0 and "UNKNOWN (Slurm cannot be asked:" in done.stdout
    assert "ENDED" not in done.stdout and "CANCELLED" not in done.stdout


def test_status_of_what_runs_and_what_has_finished(site: Site) -> None:
    chain_of_one(site, ENDED_UNEXPECTEDLY)
    site.does("squeue", 'echo "RUNNING None"')
    assert "RUNNING None" in site.tool("status.sh", str(site.run_dir)).stdout
    (site.run_dir / "logs/stage1-9.log").write_text("stage1: finished 2026-01-01\n")
    site.does("squeue", AWAY)
    assert "FINISHED" in site.tool("status.sh", str(site.run_dir)).stdout
