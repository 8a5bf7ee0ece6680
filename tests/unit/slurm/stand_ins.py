"""The shipped batch scripts with stand-ins for Slurm's clients, for what a real cluster does only on a bad day."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]
PATIENCE = 300
"""Seconds until a script counts as hanging."""

SRUN = """
while [[ "$1" == --* ]]; do shift; done
signals=0 task=""
trap 'signals=$((signals + 1)); [[ -z "$task" ]] || kill -USR1 "$task" 2>/dev/null' USR1 # srun passes signals on
"$@" &
task=$!
((signals == 0)) || kill -USR1 "$task" 2>/dev/null # the task may work, and a signal come, before this line
while
  before=$signals code=0
  wait "$task" || code=$?
  ((signals != before))
do :; done
# A program may say itself how srun ends.
[[ ! -s "$HERE/srun_says" ]] || { cat "$HERE/srun_says" >&2; rm "$HERE/srun_says"; exit "$code"; }
case "$code" in
  0) ;;
  138) echo "srun: error: node1: task 0: User defined signal 1" >&2 ;;
  143) echo "srun: error: node1: task 0: Terminated" >&2 ;;
  137) echo "srun: error: node1: task 0: Killed" >&2 ;;
  *) echo "srun: error: node1: task 0: Exited with exit code $code" >&2 ;;
esac
exit "$code"
"""

PYTHON = """
case "$*" in
  *--print_value*) place=configure ;;
  *preflight.py*) place=preflight ;;
  *) place=work ;;
esac
printf '%s\\0' "$place" "$@" $'\\n' >>"$HERE/calls"
[[ ! -f "$HERE/$place" ]] || source "$HERE/$place"
[[ "$place" != configure ]] || printf '%s\\n' "$HERE/run #1"
"""

CLIENT = """
name="$(basename "$0")"
echo "$name $*" >>"$HERE/clients"
[[ ! -f "$HERE/$name" ]] || source "$HERE/$name"
"""


class Site:
    """A copy of the scripts, stand-ins in front of the clients, and one job's log and directory.

    What a stand-in does is written, in bash, into a file of its name: `srun` and `python` have the places `configure`,
    `preflight` and `work`, clients are `squeue`, `scontrol`, `sacct` and `sbatch`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("launch", "slurm", "tools"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "megatron_qwenvl").symlink_to(ROOT / "megatron_qwenvl")
        self.programs = folder / "bin"
        self.programs.mkdir()
        self._program("srun", SRUN)
        self._program("python", PYTHON)
        self._program("sleep", 'echo "$1" >>"$HERE/pauses"')
        for name in ("squeue", "scontrol", "sacct", "sbatch"):
            self._program(name, CLIENT)
        self.run_dir = folder / "run #1"
        self.run_dir.mkdir()
        self.log = folder / "log"
        self.does("squeue", "echo RUNNING")

    def _program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/bash\n{text.strip()}\n")
        path.chmod(0o755)

    def does(self, name: str, text: str) -> None:
        """Let a stand-in do something."""
        (self.folder / name).write_text(text + "\n")

    def start(
        self, script: str = "stage1_pretrain.sbatch", *arguments: str, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a batch script as slurmd does."""
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "stage1", "SLURM_JOB_NODELIST": "node[1-2]",
               "MASTER_ADDR": "127.0.0.1", "SLURM_SUBMIT_DIR": str(self.folder)}  # fmt: skip
        with self.log.open("ab") as log:
            return subprocess.Popen(
                ["bash", self.folder / "slurm" / script, *arguments], cwd=self.folder, stdout=log, stderr=log,
                env=self.environment | job | environment,
            )  # fmt: skip

    def run(self, script: str = "stage1_pretrain.sbatch", *arguments: str, **environment: str) -> int:
        """Run a batch script to its end; returns its exit code."""
        return self.start(script, *arguments, **environment).wait(PATIENCE)

    def tool(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script that is called by people."""
        return subprocess.run(
            ["bash", self.folder / "slurm" / script, *arguments], cwd=self.folder, capture_output=True, text=True,
            env=self.environment | environment, timeout=PATIENCE,
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """Without anything of a job that the tests may run in."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER_", "PYTHON"))}
        return inherited | {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "HERE": str(self.folder),
            "PYTHON": str(self.programs / "python"),
        }

    @property
    def status(self) -> str:
        """The first line of the log."""
        return self.log.read_text().splitlines()[0].rstrip()

    @property
    def calls(self) -> list[list[str]]:
        """Every call of a program: its place and its arguments."""
        path = self.folder / "calls"
        text = path.read_text() if path.exists() else ""
        return [call.split("\0") for call in text.split("\0\n\0")[:-1]]

    @property
    def clients(self) -> list[str]:
        """Every call of one of Slurm's clients."""
        path = self.folder / "clients"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def requeued(self) -> bool:
        """Whether the job asked to be started again."""
        return "scontrol requeue 7" in self.clients

    @property
    def failures(self) -> list[str]:
        """Causes in the run's ledger."""
        path = self.run_dir / "failures.tsv"
        return [line.split("\t")[3] for line in path.read_text().splitlines()] if path.exists() else []
