"""How a job judges the end of its phases: finished, interrupted or failed, whatever signals come and whichever client
of Slurm fails."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from .stand_ins import PATIENCE, Site

pytestmark = pytest.mark.slow

SCRIPTS = {
    "stage1_pretrain.sbatch": ("configure", "preflight", "work"),
    "next_stage.sbatch": ("preflight", "work"),
    "export.sbatch": ("work",),
    "import_checkpoint.sbatch": ("work",),
    "prepare_data.sbatch": ("preflight", "work"),
    "profile_throughput.sbatch": ("preflight", "work"),
}
ENDS = {138: "kill -USR1 $BASHPID", 143: "kill -TERM $BASHPID"}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize(
    ("script", "place"), [(script, place) for script, places in SCRIPTS.items() for place in places]
)
def test_a_signal_that_ends_work_before_it_can_save_is_no_failure(
    site: Site, script: str, place: str, name: int
) -> None:
    site.does(place, ENDS[name])
    for restarts in ("0", "1", "2", "3"):
        assert site.run(script, SLURM_RESTART_COUNT=restarts) == 75
        assert "to be started again: interrupted" in site.status
    assert site.clients.count("scontrol requeue 7") == 4
    assert site.failures == []


def test_several_index_tasks_are_interrupted_too(site: Site) -> None:
    site.does("work", ENDS[143])
    assert site.run("prepare_data.sbatch", SLURM_NTASKS="4") == 75 and site.requeued


@pytest.mark.parametrize(
    "said",
    [
        "0: FAILED (lost peer) Connection closed\nsrun: error: node2: task 1: User defined signal 1\n"
        "srun: error: node1: task 0: Exited with exit code 70\n",
        "srun: error: node1: tasks 0-3: Terminated\nsrun: error: node2: task 4: Killed\n",
        "1: FAILED (lost peer) Connection closed\nsrun: error: node1: task 1: Exited with exit code 70\n"
        "srun: error: node1: task 0: Terminated\n",
        "srun: error: node1: task 0: Exited with exit code 75\nsrun: error: node2: task 1: Killed\n",
        "srun: forcing job termination\nsrun: error: node2: task 1: Killed\n",
    ],
)
def test_what_the_first_rank_died_of_decides_interrupted(site: Site, said: str) -> None:
    (site.folder / "said").write_text(said)
    site.does("work", 'cp "$HERE/said" "$HERE/srun_says"; exit 143')
    assert site.run() == 75
    assert site.requeued and site.failures == []


@pytest.mark.parametrize(
    ("said", "code", "cause"),
    [
        # srun ends the others with SIGTERM, so that its own code is 143.
        ("0: FAILED (error) DataError: no shard\nsrun: error: node1: task 0: Exited with exit code 1\n"
         "srun: error: node2: task 1: Terminated\n", 143, "FAILED (error) DataError: no shard"),
        ("1: FAILED (lost peer) gone\nsrun: error: node2: task 3: Killed\nsrun: error: node1: task 0: Terminated\n",
         143, "srun: error: node2: task 3: Killed"),
        ("0: FAILED (crash) ValueError\n1: FAILED (lost peer) gone\n"
         "srun: error: node1: task 0: Exited with exit code 70\nsrun: error: node2: task 1: Terminated\n",
         143, "FAILED (crash) ValueError"),
        ("srun: error: node1: task 0: Exited with exit code 127\nsrun: error: node2: task 1: Terminated\n",
         143, "srun: error: node1: task 0: Exited with exit code 127"),
        ("srun: error: node1: task 0: Floating point exception (core dumped)\n"
         "srun: error: node2: task 1: Terminated\n", 143,
         "srun: error: node1: task 0: Floating point exception (core dumped)"),
    ],
)  # fmt: skip
def test_what_the_first_rank_died_of_decides_failed(site: Site, said: str, code: int, cause: str) -> None:
    (site.folder / "said").write_text(said)
    site.does("work", f'cp "$HERE/said" "$HERE/srun_says"; exit {code}')
    assert site.run() == 75 and site.requeued
    assert site.failures == [cause]
    assert site.run(SLURM_RESTART_COUNT="1") == 1
    assert cause in site.status and "same failure twice" in site.status


def test_interruptions_between_failures_do_not_count(site: Site) -> None:
    site.does("work", "kill -KILL $BASHPID")
    assert site.run() == 75
    site.does("work", ENDS[143])
    assert site.run(SLURM_RESTART_COUNT="1") == 75 and site.run(SLURM_RESTART_COUNT="2") == 75
    assert len(site.failures) == 1


def test_a_conversion_that_is_killed_is_started_again_some_times(site: Site) -> None:
    site.does("work", "kill -KILL $BASHPID")
    codes = [site.run("next_stage.sbatch", SLURM_RESTART_COUNT=str(n)) for n in range(3)]
    assert codes == [75, 75, 1]
    assert "FAILED: srun: error: node1: task 0: Killed; 3 failures" in site.status


@pytest.mark.parametrize(
    ("place", "script"),
    [
        ("configure", "stage1_pretrain.sbatch"),
        ("preflight", "stage1_pretrain.sbatch"),
        ("work", "export.sbatch"),
    ],
)
def test_a_verdict_of_the_work_ends_the_job_with_a_reason(site: Site, place: str, script: str) -> None:
    site.does(place, "echo 'it cannot be: because' >&2; exit 1")
    assert site.run(script) == 1
    assert "FAILED: it cannot be: because" in site.status and not site.requeued
    site.does(place, "exit 1")
    site.log.unlink()
    assert site.run(script) == 1
    assert "FAILED: srun: error: node1: task 0: Exited with exit code 1" in site.status


# --- signals to the batch shell itself --------------------------------------------------------------------------------


UNTIL_TOLD = 'for ((i = 0; i < 6000; i++)); do [[ ! -e "$HERE/go" ]] || exit 0; /bin/sleep 0.05; done'
"""A phase works until the file `go` appears, however slow the machine is."""


def start_and_wait(site: Site) -> subprocess.Popen[bytes]:
    """Start a job and wait until the stand-in that touches `there` runs."""
    job = site.start()
    while not (site.folder / "there").exists():
        assert job.poll() is None, site.log.read_text()
        time.sleep(0.02)
    return job


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("place", ["configure", "preflight", "work"])
def test_a_signal_to_the_shell_reaches_the_phase_or_keeps_it_from_starting(
    site: Site, place: str, number: signal.Signals
) -> None:
    """Slurm sends the notice of a time limit to the shell, at whatever moment."""
    site.does(
        place,
        f'trap \'touch "$HERE/signalled"; exit 75\' USR1; touch "$HERE/there"\n{UNTIL_TOLD}',
    )
    job = start_and_wait(site)
    job.send_signal(number)
    job.send_signal(number)
    if place == "configure":
        (site.folder / "go").touch()
    assert job.wait(PATIENCE) == 75
    # The shell asks for the configuration in a subshell, waits for the answer, and starts nothing else.
    assert (site.folder / "signalled").exists() == (place != "configure")
    assert "to be started again: interrupted" in site.status and site.requeued and site.failures == []
    assert [call[0] for call in site.calls][-1] == place


def test_a_signal_between_two_phases_keeps_the_next_one_from_starting(site: Site) -> None:
    """It comes while the shell notes the size of the log, before preflight."""
    site.does("preflight", "exit 0")
    wait = f'touch "$HERE/there"; ({UNTIL_TOLD})'
    site._program("stat", f'[[ ! -e "$HERE/calls" ]] || {{ {wait}; }}\nexec /usr/bin/stat "$@"')
    job = start_and_wait(site)
    job.send_signal(signal.SIGUSR1)
    (site.folder / "go").touch()
    assert job.wait(PATIENCE) == 75
    assert [call[0] for call in site.calls] == ["configure"]
    assert "to be started again: interrupted by SIGUSR1 during preflight" in site.status and site.requeued


FORK = """
source "$SLURM_SUBMIT_DIR/slurm/prologue.sh"
set -o functrace
trap '[[ "$BASH_COMMAND" != "exec {pipe}"* ]] || { trap - DEBUG; kill -USR1 $$; }' DEBUG
code=0
run_phase /bin/sleep 20 || code=$?
exit "$code"
"""
"""A batch script that gets SIGUSR1 after it has found no signal, and before it starts the phase."""


def test_a_signal_while_a_phase_is_forked_reaches_it(site: Site) -> None:
    (site.folder / "slurm/fork.sbatch").write_text(FORK)
    assert site.run("fork.sbatch") == 138


# --- clients that fail ------------------------------------------------------------------------------------------------

AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


@pytest.mark.parametrize("squeue", [AWAY, "exit 1", "exit 0", "echo 'squeue: error: x' >&2; kill -TERM $$"])
@pytest.mark.parametrize("work", ["exit 75", "exit 70"])
def test_no_answer_of_squeue_does_not_mean_stopped(site: Site, squeue: str, work: str) -> None:
    site.does("squeue", squeue)
    site.does("work", work)
    assert site.run() == 75
    assert site.requeued and "to be started again" in site.status
    assert len(site.failures) == (work == "exit 70")


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "TIMEOUT", "NODE_FAIL"])
def test_stopped_is_what_slurm_says(site: Site, state: str) -> None:
    site.does("squeue", f"echo {state}")
    site.does("work", "exit 70")
    assert site.run() == 75
    assert "stopped by Slurm" in site.status and not site.requeued and site.failures == []


def test_requeue_waits_for_the_controller(site: Site) -> None:
    site.does("work", "exit 75")
    site.does("scontrol", f'echo x >>"$HERE/tries"; (($(wc -l <"$HERE/tries") > 3)) || {{ {AWAY}; }}')
    assert site.run() == 75
    assert site.clients.count("scontrol requeue 7") == 4 and "to be started again" in site.status


def test_a_requeue_that_was_done_without_an_answer_is_done(site: Site) -> None:
    site.does("work", "exit 75")
    site.does("scontrol", f"echo 'echo PENDING' >\"$HERE/squeue\"; {AWAY}")
    assert site.run() == 75
    assert site.clients.count("scontrol requeue 7") == 1 and "FAILED" not in site.status


@pytest.mark.parametrize("case", ["refused", "too long", "no scontrol"])
def test_a_job_that_cannot_be_requeued_says_why(site: Site, case: str) -> None:
    site.does("work", "exit 75")
    settings = {"SLURM_WAIT_SECONDS": "0"} if case == "too long" else {}
    site.does("scontrol", AWAY)
    said = "Unable to contact slurm controller"
    if case == "refused":
        said = "Requested operation is presently disabled for job 7"
        site.does("scontrol", f"echo '{said}' >&2; exit 1")
    if case == "no scontrol":
        said = "scontrol: command not found"
        (site.programs / "scontrol").unlink()
        settings["PATH"] = f"{site.programs}:{basics(site)}"
    assert site.run(**settings) == 1
    assert "FAILED: interrupted" in site.status and said in site.status


def basics(site: Site) -> Path:
    """What the scripts call beside Slurm, without the machine's own clients of Slurm."""
    folder = site.folder / "basics"
    folder.mkdir()
    for name in ("awk", "bash", "basename", "cat", "date", "dd", "dirname", "env", "grep", "head", "mkdir", "paste",
                 "python3", "readlink", "rm", "sed", "sleep", "stat", "tail", "timeout", "tr", "wc", "cp"):  # fmt: skip
        found = next(Path(p, name) for p in ("/usr/bin", "/bin") if Path(p, name).exists())
        (folder / name).symlink_to(found)
    return folder


def test_srun_that_cannot_reach_slurm_is_no_verdict(site: Site) -> None:
    message = "srun: error: Unable to create step for job 7: Socket timed out on send/recv operation"
    for place in ("configure", "preflight", "work"):
        (site.folder / "said").write_text(message + "\n")
        site.does(place, 'cp "$HERE/said" "$HERE/srun_says"; exit 1')
        assert site.run() == 75
        assert "to be started again: Slurm could not be reached" in site.status
        (site.folder / place).unlink()
    assert site.failures == []


def test_bad_nodes_are_excluded_though_scontrol_fails_at_first(site: Site) -> None:
    site.does(
        "preflight", 'printf "node2\\n" >"$HERE/run #1/bad_nodes.txt"; echo "preflight: FAILED: x"; exit 3'
    )
    site.does("scontrol", f'[[ "$1" != update && "$2" != show ]] || {{ echo x >>"$HERE/tries"; '
              f'(($(wc -l <"$HERE/tries") % 2 == 0)) || {{ {AWAY}; }}; }}\n'
              '[[ "$2" != show ]] || echo "JobId=7 ExcNodeList=node9 x=1"')  # fmt: skip
    assert site.run() == 75
    assert "scontrol update jobid=7 ExcNodeList=node9,node2" in site.clients


# --- without the restart policy ---------------------------------------------------------------------------------------


def break_policy(site: Site, how: str) -> dict[str, str]:
    """Let slurm/restart_policy.py fail; returns the environment of the job."""
    if how == "no python3":
        folder = basics(site)
        (folder / "python3").unlink()
        return {"PATH": f"{site.programs}:{folder}"}
    site._program("python3", {"old": "exit 1", "killed": "kill -KILL $$", "nonsense": "echo well"}[how])
    return {}


@pytest.mark.parametrize("how", ["no python3", "old", "killed", "nonsense"])
def test_without_the_policy_a_failure_is_requeued_a_few_times(site: Site, how: str) -> None:
    settings = break_policy(site, how)
    site.does("work", "exit 70")
    assert [site.run(SLURM_RESTART_COUNT=str(n), **settings) for n in range(3)] == [75, 75, 1]
    assert site.clients.count("scontrol requeue 7") == 2
    assert (
        "FAILED: exit code 70 during training; 3 failures, and the restart policy cannot run" in site.status
    )
    assert "python3 of version 3.6 or newer is needed" in site.log.read_text()


def test_without_the_policy_an_interruption_is_no_failure(site: Site) -> None:
    settings = break_policy(site, "no python3")
    site.does("work", "exit 75")
    assert [site.run(SLURM_RESTART_COUNT=str(n), **settings) for n in range(5)] == [75] * 5
    assert site.clients.count("scontrol requeue 7") == 5
    site.does("work", "exit 0")
    assert site.run(SLURM_RESTART_COUNT="5", **settings) == 0


def test_without_the_policy_stopped_is_what_slurm_says(site: Site) -> None:
    settings = break_policy(site, "no python3")
    site.does("work", "exit 70")
    site.does("squeue", "echo CANCELLED")
    assert site.run(**settings) == 75
    assert "stopped by Slurm" in site.status and not site.requeued


def test_limits_that_are_no_numbers_end_the_job_with_their_names(site: Site) -> None:
    assert site.run(MAX_FAILURES="three") == 1
    assert "FAILED: MAX_FAILURES=three" in site.status and "expected numbers" in site.status
    assert site.calls == []


# --- arguments and the log --------------------------------------------------------------------------------------------

HARD = [
    "--run_dir",
    "exp #3",
    "--data.root",
    "a 'b' \"c\" * $HOME\nnext: line",
    "--x=-y",
    "",
    "--recipe mine",
]


def test_arguments_arrive_as_they_were_given(site: Site) -> None:
    assert site.run("stage1_pretrain.sbatch", *HARD) == 0
    configure, preflight, work = site.calls
    given = ["--recipe", "stage1", *HARD]
    assert configure[1:] == ["-m", "megatron_qwenvl.train", *given, "--print_value", "run_dir"]
    assert preflight[2:] == [*given, "--bad_nodes", f"{site.run_dir}/bad_nodes.txt"]
    assert work[1:] == ["-m", "megatron_qwenvl.train", *given]
    assert site.run("next_stage.sbatch", *HARD) == 0
    assert site.calls[-1][2:] == ["next-stage", *HARD]


@pytest.mark.parametrize("given", [["--recipe", "mine.yaml"], ["--recipe=mine.yaml"]])
def test_a_recipe_among_the_arguments_comes_last_and_wins(site: Site, given: list[str]) -> None:
    assert site.run("stage1_pretrain.sbatch", *given) == 0
    assert all(call[-4:] != ["--recipe", "stage1"] for call in site.calls)
    assert site.calls[-1][1:] == ["-m", "megatron_qwenvl.train", "--recipe", "stage1", *given]


def test_labels_of_the_site_do_not_become_part_of_a_path(site: Site) -> None:
    site._program("srun", 'printf "%s " "$@" >>"$HERE/sruns"; echo >>"$HERE/sruns"\n'
                  'while [[ "$1" == --* || "$1" == -* ]]; do shift; done; "$@"')  # fmt: skip
    assert site.run(SRUN_OPTIONS="--label --mpi=none -l") == 0
    first, second, _ = (site.folder / "sruns").read_text().splitlines()
    assert "--label" not in first and " -l " not in first and "--mpi=none" in first
    assert "--label" in second


def test_the_first_line_stays_one_line(site: Site) -> None:
    site.does("configure", "echo 'Pfad /" + "ä运" * 300 + "' >&2; exit 2")
    assert site.run() == 1
    first, second = site.log.read_bytes().split(b"\n")[:2]
    assert len(first) == 500 and "FAILED: Pfad /ä运" in first.decode()
    assert second.startswith(b"=== attempt 1 of job 7")


# --- jobs that ended unexpectedly -----------------------------------------------------------------------------------


def kill_shell_at_work(site: Site) -> None:
    site.does("work", f'touch "$HERE/there"; {UNTIL_TOLD}')
    job = start_and_wait(site)
    job.kill()
    job.wait(PATIENCE)
    (site.folder / "go").touch()
    site.does("work", "exit 0")


def test_the_next_attempt_and_the_next_job_report_one_that_ended_unexpectedly(site: Site) -> None:
    kill_shell_at_work(site)
    assert "running since" in site.status
    ended = "echo FAILED"
    site.does("squeue", f'[[ "$*" != *"--job 7 "* ]] || {{ {ended}; exit; }}; echo RUNNING')
    site.does("scontrol", '[[ "$2" != show ]] || echo "JobId=7 JobState=FAILED Reason=x ExitCode=0:9 y=z"')
    other = site.log
    site.log = site.folder / "log2"
    assert site.run(SLURM_JOB_ID="8") == 0
    text = site.log.read_text()
    assert (
        "=== job 7 worked in this run directory and ended unexpectedly: Slurm says FAILED, exit code 0:9"
        in text
    )
    site.log = other
    assert site.run(SLURM_RESTART_COUNT="1") == 0
    assert "=== the previous attempt ended unexpectedly" in site.log.read_text()
    assert not (site.run_dir / "job.txt").exists()


def test_the_note_of_a_live_job_stays(site: Site) -> None:
    (site.run_dir / "job.txt").write_text("6 since yesterday\n")
    site.does("preflight", "echo 'preflight: FAILED: taken'; exit 1")
    assert site.run() == 1
    assert (site.run_dir / "job.txt").read_text() == "6 since yesterday\n"
