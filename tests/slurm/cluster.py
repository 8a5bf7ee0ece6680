"""A real Slurm cluster of four nodes on this machine: slurmctld, one slurmd per node, munge."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = 4
PATIENCE = 1500.0
"""Seconds that a test waits for what must come: a busy machine is slow, and what cannot come any more fails at once."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")

CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired, by default two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
MinJobAge=3600
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
EnforcePartLimits=ALL
GresTypes=gpu
NodeName=node[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports} CPUs=96 RealMemory=100000 Gres=gpu:8
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=closed Nodes=ALL AllowAccounts=project State=UP
"""


def missing_programs() -> list[str]:
    """What of Slurm and munge is not installed here, or who one must be to start it."""
    os.environ["PATH"] += ":/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return missing if os.geteuid() == 0 else [*missing, "root"]


class Cluster:
    """The cluster while it runs; its commands work in `environment`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        ports = _free_ports(NODES + 1)
        configuration = CONFIGURATION.format(
            folder=self.folder,
            nodes=NODES,
            controller_port=ports[0],
            ports=f"[{','.join(map(str, ports[1:]))}]",
        )
        (self.folder / "slurm.conf").write_text(configuration)
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        places = {"socket": "socket", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
        self._daemon(munge + [f"--{option}={self.folder}/munge.{end}" for option, end in places.items()])
        wait_until(lambda: (self.folder / "munge.socket").exists(), "munge does not start")
        self._daemon(["slurmctld", "-D"])
        self._controller = self._daemons[-1]
        for number in range(1, NODES + 1):
            self._daemon(["slurmd", "-D", "-N", f"node{number}"])
        idle = f"{NODES} idle"
        wait_until(
            lambda: self.try_run("sinfo", "--noheader", "--partition=main", "--format=%D %t").strip() == idle,
            "the nodes do not get idle",
        )  # fmt: skip

    def pause_controller(self, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Let Slurm's controller answer nobody for a while, in which something happens."""
        self._controller.send_signal(signal.SIGSTOP)
        try:
            meanwhile()
            time.sleep(seconds)
        finally:
            self._controller.send_signal(signal.SIGCONT)

    def cancel_all(self) -> None:
        """End what a test left behind, so that the next one finds every node idle."""
        self.try_run("scancel", "--user=root", "--full", "--signal=KILL")
        self.try_run("scancel", "--user=root")
        wait_until(lambda: not self.run("squeue", "--noheader"), "jobs do not end")

    def stop(self) -> None:
        """End all daemons."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _daemon(self, command: list[str]) -> None:
        quiet = subprocess.DEVNULL
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdin=quiet, stdout=quiet, stderr=quiet)
        )

    def run(self, *command: str) -> str:
        """Output of a command that must succeed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def try_run(self, *command: str) -> str:
        """Output of a command, or what it said when it failed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)
        return done.stdout or done.stderr

    def state(self, job: str) -> str:
        """State of a job, such as RUNNING or COMPLETED."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return shown.split("JobState=")[1].split()[0]

    def wait_for_state(self, job: str, *states: str) -> str:
        """Wait until a job is in one of the states; returns it. Fails as soon as it has ended in another one."""

        def reached() -> bool:
            state = self.state(job)
            assert state in states or state not in ENDED, (
                f"job {job}: expected {' or '.join(states)}, found {state}"
            )
            return state in states

        wait_until(reached, f"job {job} does not get {' or '.join(states)}")
        return self.state(job)

    def wait_while_alive(self, job: str, condition: Callable[[], bool], otherwise: str) -> None:
        """Wait for something that a job does. Fails as soon as the job has ended without doing it."""

        def holds() -> bool:
            ended = self.state(job) in ENDED
            done = condition()  # asked after the state: what the job did last counts
            assert done or not ended, f"{otherwise}: job {job} has ended ({self.state(job)})"
            return done

        wait_until(holds, otherwise)


def wait_until(condition: Callable[[], bool], otherwise: str, seconds: float = PATIENCE) -> None:
    """Poll until the condition holds.

    Raises:
        AssertionError: `otherwise`, when the time is over.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{otherwise} within {seconds:.0f} s"
        time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
