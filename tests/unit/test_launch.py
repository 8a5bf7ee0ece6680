"""The launchers start every rank with its place, its rendezvous and its arguments, and return its exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PATIENCE = 500
"""Seconds until a program counts as hanging."""
REPORT = """
import dataclasses, json, sys
from pathlib import Path
from megatron_qwenvl.processes import detect_process
process = detect_process()
report = {**dataclasses.asdict(process), "arguments": sys.argv[1:], "program": __file__}
Path(__file__).parents[1].joinpath(f"rank-{process.rank}.json").write_text(json.dumps(report))
sys.exit(7 if "--fail" in sys.argv and process.rank == 1 else 0)
"""
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0")" "$@" >"$RECORD"
env >"$RECORD.env"
"""
SCONTROL = """#!/usr/bin/env bash
[[ -z "${SCONTROL_FAILS:-}" ]] || { echo "slurm_load_node error: Unable to contact slurm controller" >&2; exit 1; }
case "$*" in
  "--oneliner show node node6") echo "NodeName=node6 NodeAddr=fd00::6 NodeHostName=node6" ;;
  "--oneliner show node node3") echo "NodeName=node3 Arch=x86_64 NodeAddr=10.0.0.3 NodeHostName=node3" ;;
esac
"""
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[3-4]"}
PYXIS = {"CONTAINER_IMAGE": "ngc/pytorch:25.10", "CONTAINER_RUNTIME": "pyxis"}
APPTAINER = {"CONTAINER_IMAGE": "torch.sif", "CONTAINER_RUNTIME": "apptainer"}

needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The launchers beside a trainer and a tool that write down which process they are."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    package, tools = tmp_path / "megatron_qwenvl", tmp_path / "tools"
    package.mkdir()
    tools.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text(REPORT)
    (tools / "report.py").write_text(REPORT)
    shutil.copy(ROOT / "megatron_qwenvl/runtime/processes.py", package)
    (package / "runtime").mkdir()
    for name in ("__init__", "exit_codes", "exit_process", "stop_signals", "torchrun"):
        shutil.copy(ROOT / f"megatron_qwenvl/runtime/{name}.py", package / "runtime")
    return tmp_path


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs of a cluster that write down how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("srun", "mpirun", "apptainer", "scontrol"):
        (programs / name).write_text(SCONTROL if name == "scontrol" else STAND_IN)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    return tmp_path / "record"


def run(tree: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher from another directory, in an environment without any launcher's variables."""
    launchers = ("SLURM", "OMPI", "PMI", "MASTER_", "PYTHON", "CONTAINER_", "RANK", "WORLD_", "LOCAL_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return subprocess.run(
        [tree / "launch" / script, *arguments],
        cwd="/", env={**clean, **environment}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip


def launch(tree: Path, script: str, **environment: str) -> list[dict[str, Any]]:
    """Run a launcher with two processes and return what they wrote, by rank."""
    settings = {"PYTHON": sys.executable, "NPROC": "2", **AS_ROOT, **environment}
    result = run(tree, script, "--name", "two words", "--seed=3", **settings)
    assert result.returncode == 0, result.stderr
    return [json.loads((tree / f"rank-{rank}.json").read_text()) for rank in range(2)]


def recorded(record: Path, tree: Path, script: str, *arguments: str, **environment: str) -> list[str]:
    """The call that a launcher ends in, word by word, where stand-ins record it."""
    result = run(tree, script, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return record.read_text().splitlines()


def check(reports: list[dict[str, Any]], launcher: str) -> None:
    assert [report["rank"] for report in reports] == [0, 1]
    assert [report["local_rank"] for report in reports] == [0, 1]
    for report in reports:
        assert (report["launcher"], report["world_size"], report["local_world_size"]) == (launcher, 2, 2)
        assert report["arguments"] == ["--name", "two words", "--seed=3"]
        assert report["init_method"] == reports[0]["init_method"]
        assert report["init_method"].startswith("tcp://127.0.0.1:")


def test_local(tree: Path) -> None:
    reports = launch(tree, "local.sh")
    check(reports, "torchrun")
    assert reports[0]["node_rank"] == 0
    assert reports[0]["program"] == str(tree / "megatron_qwenvl/train.py")


@needs_mpirun
def test_mpirun(tree: Path) -> None:
    reports = launch(tree, "mpirun.sh")
    check(reports, "mpi")
    assert reports[0]["program"] == str(tree / "megatron_qwenvl/train.py")


@needs_mpirun
def test_a_given_port_wins(tree: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert launch(tree, "mpirun.sh", MASTER_PORT=port)[1]["init_method"] == f"tcp://127.0.0.1:{port}"


@needs_mpirun
def test_other_mpi_launchers_are_asked_through_mpi4py(tree: Path) -> None:
    """Without Open MPI's own variables its PMIx rank is left, as prrte and srun --mpi=pmix set it."""
    loads = subprocess.run(
        [sys.executable, "-c", "from mpi4py import MPI"], env={**os.environ, **AS_ROOT}, capture_output=True
    )
    if loads.returncode:
        pytest.skip("mpi4py finds no MPI library")
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    hidden = [word for name in names for word in ("-u", f"OMPI_COMM_WORLD_{name}")]
    command = ["mpirun", "-np", "2", "--host", "localhost:2", "env", *hidden, sys.executable]
    command += [str(tree / "tools/report.py"), "--name", "two words", "--seed=3"]
    env = {**os.environ, **AS_ROOT, "PYTHONPATH": str(tree)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    reports = [json.loads((tree / f"rank-{rank}.json").read_text()) for rank in range(2)]
    check(reports, "mpi")
    assert [report["node_rank"] for report in reports] == [0, 0]  # Open MPI's variables have no node
    assert reports[0]["init_method"].rpartition(":")[2] != "0"
    # One rank's wrong number stops them all, also the one that has no complaint and would wait for ever.
    env["RANK"] = "0"
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode != 0
    assert "RANK=0 contradicts mpi4py's rank=1" in result.stderr


@pytest.mark.parametrize("script", ["local.sh", pytest.param("mpirun.sh", marks=needs_mpirun)])
def test_another_program_and_its_exit_code(script: str, tree: Path) -> None:
    settings = {"PYTHON": sys.executable, "NPROC": "2", "PROGRAM": "tools/report.py", **AS_ROOT}
    assert run(tree, script, "--fail", **settings).returncode == 7
    report = json.loads((tree / "rank-1.json").read_text())
    assert (report["program"], report["arguments"]) == (str(tree / "tools/report.py"), ["--fail"])


SAVES = """
import signal, sys, time
from pathlib import Path
from megatron_qwenvl.processes import detect_process
rank = detect_process().rank
folder = Path(__file__).parent
def save(number, frame):
    (folder / f"saving-{rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.02)
    sys.exit(75)
signal.alarm(500)  # nothing may be left of a test that failed
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, save)
(folder / f"ready-{rank}").touch()
while True:
    signal.pause()
"""


def wait_for_both(launcher: subprocess.Popen[str], folder: Path, event: str) -> None:
    """Wait until two ranks have told `event`."""
    while len(list(folder.glob(f"{event}-*"))) < 2:
        assert launcher.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_alone_lets_the_ranks_save(tree: Path, number: signal.Signals) -> None:
    (tree / "tools/saves.py").write_text(SAVES)
    env = {**os.environ, "PYTHON": sys.executable, "NPROC": "2", "PROGRAM": "tools/saves.py"}
    with subprocess.Popen([tree / "launch/local.sh"], env=env, stderr=subprocess.PIPE, text=True) as launcher:
        wait_for_both(launcher, tree / "tools", "ready")
        launcher.send_signal(number)
        wait_for_both(launcher, tree / "tools", "saving")
        (tree / "tools/go").touch()
        _, said = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 75, said
    assert "Traceback" not in said


def test_srun(tree: Path, stand_ins: Path) -> None:
    options = {"SRUN_OPTIONS": " --label\n  --comment=* ", "SLURM_CPUS_PER_TASK": "5", "PYTHON": "python9"}
    called = recorded(stand_ins, tree, "srun.sh", "--name", "two words", **ALLOCATION, **options)
    assert called == [
        "srun", "--kill-on-bad-exit=1", "--label", "--comment=*",
        "python9", "-m", "megatron_qwenvl.train", "--name", "two words",
    ]  # fmt: skip
    environment = stand_ins.with_suffix(".env").read_text().splitlines()
    assert {"MASTER_ADDR=10.0.0.3", "SRUN_CPUS_PER_TASK=5", f"PYTHONPATH={tree}"} <= set(environment)
    (port,) = (line.removeprefix("MASTER_PORT=") for line in environment if line.startswith("MASTER_PORT="))
    assert 20000 <= int(port) < 32000


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu-a[01-02,07].cluster.example", "gpu-a01.cluster.example"),
        ("node7", "node7"),
        ("login,gpu[3-4]", "login"),
        ("gpu[009,011-12]", "gpu009"),
        ("rack[2-3]-node[05-06],x1", "rack2-node05"),
        ("rack[2,4]n[1]-ib[0-1],y", "rack2n1-ib0"),
    ],
)
def test_first_host_of_a_list(tree: Path, nodes: str, first: str) -> None:
    command = ["bash", "-euc", f'source "{tree}/launch/env.sh"; first_host "$1"', "-", nodes]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == first + "\n"


def test_an_ipv6_address_of_a_node(tree: Path, stand_ins: Path) -> None:
    recorded(stand_ins, tree, "srun.sh", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="node[6,8]")
    assert "MASTER_ADDR=fd00::6" in stand_ins.with_suffix(".env").read_text().splitlines()


@pytest.mark.parametrize(("script", "missing"), [("srun.sh", True), ("mpirun.sh", True), ("srun.sh", False)])
def test_where_slurm_cannot_be_asked_a_name_that_resolves_will_do(
    tree: Path, stand_ins: Path, script: str, missing: bool
) -> None:
    """In a container without scontrol, and while the controller is away."""
    if missing:
        (tree / "bin/scontrol").unlink()
    path = f"{tree}/bin:{only_basics(tree)}"
    settings = {"PATH": path, "SCONTROL_FAILS": "1", "SLURM_JOB_ID": "7"}
    recorded(stand_ins, tree, script, **settings, SLURM_JOB_NODELIST="localhost,node[3-4]")
    assert "MASTER_ADDR=localhost" in stand_ins.with_suffix(".env").read_text().splitlines()
    result = run(tree, script, **settings, SLURM_JOB_NODELIST="nowhere[01-02].invalid")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "nowhere01.invalid" in line and "MASTER_ADDR" in line
    assert ("there is no scontrol" if missing else "Unable to contact slurm controller") in line


def only_basics(tree: Path) -> Path:
    """A folder of what launchers call beside Slurm's clients; the machine's own may lie among the rest."""
    folder = tree / "basics"
    folder.mkdir()
    for name in ("bash", "env", "dirname", "basename", "grep", "getent", "sleep", "python3"):
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def test_number_of_processes_under_slurm(tree: Path, stand_ins: Path) -> None:
    assert "--ntasks=3" in recorded(stand_ins, tree, "srun.sh", **ALLOCATION, NPROC="3")
    called = recorded(stand_ins, tree, "mpirun.sh", **ALLOCATION, NPROC="3")
    assert called[called.index("-np") + 1] == "3"


def test_mpirun_takes_the_allocation_as_it_is(tree: Path, stand_ins: Path) -> None:
    called = recorded(stand_ins, tree, "mpirun.sh", **ALLOCATION, PYTHON="python9")
    assert called[:3] == ["mpirun", "--bind-to", "none"]
    assert called[-3:] == ["python9", "-m", "megatron_qwenvl.train"]
    assert "MASTER_ADDR=10.0.0.3" in stand_ins.with_suffix(".env").read_text()


def test_mpirun_hands_over_what_a_rank_needs(tree: Path, stand_ins: Path) -> None:
    settings = {
        "HOSTS": "node5:8,node6:8",
        "NCCL_DEBUG": "INFO",
        "SECRET": "x",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    called = recorded(stand_ins, tree, "mpirun.sh", **settings)
    assert called[:3] == ["mpirun", "--host", "node5:8,node6:8"] and "-np" not in called
    handed = {called[i + 1] for i, word in enumerate(called) if word == "-x"}
    rendezvous = {"MASTER_ADDR", "MASTER_PORT"}
    assert {*rendezvous, "PYTHONPATH", "PATH", "OMP_NUM_THREADS", *settings} - handed == {"HOSTS", "SECRET"}
    assert "MASTER_ADDR=node5" in stand_ins.with_suffix(".env").read_text()


def test_pyxis_runs_the_ranks_in_a_container(tree: Path, stand_ins: Path) -> None:
    called = recorded(
        stand_ins, tree, "srun.sh", **ALLOCATION, **PYXIS, CONTAINER_OPTIONS="--container-writable"
    )
    assert called == [
        "srun", "--kill-on-bad-exit=1", "--container-image=ngc/pytorch:25.10",
        f"--container-mounts={tree}:{tree}", "--container-workdir=/", "--container-writable",
        "python3", "-m", "megatron_qwenvl.train",
    ]  # fmt: skip
    mounts = {"CONTAINER_MOUNTS": "/data:/data"}
    assert "--container-mounts=/data:/data" in recorded(
        stand_ins, tree, "srun.sh", **ALLOCATION, **PYXIS, **mounts
    )


def test_apptainer_runs_the_ranks_in_a_container(tree: Path, stand_ins: Path) -> None:
    inside = [
        "apptainer",
        "exec",
        "--nv",
        "--bind",
        f"{tree}:{tree}",
        "--writable-tmpfs",
        "torch.sif",
        "python3",
    ]
    settings = {**APPTAINER, "CONTAINER_OPTIONS": "--writable-tmpfs"}
    called = recorded(stand_ins, tree, "srun.sh", **ALLOCATION, **settings)
    assert called == ["srun", "--kill-on-bad-exit=1", *inside, "-m", "megatron_qwenvl.train"]
    called = recorded(stand_ins, tree, "mpirun.sh", **settings)
    assert called[-10:] == [*inside, "-m", "megatron_qwenvl.train"]
    called = recorded(stand_ins, tree, "local.sh", **settings)
    assert called[:9] == [*inside, f"{tree}/launch/torchrun.py"]


@pytest.mark.parametrize(
    ("container", "inside"),
    [
        ({"PYTHON": "python9"}, ["python9"]),
        (PYXIS, ["srun", "--nodes=1", "--ntasks=1", "--container-image=ngc/pytorch:25.10"]),
        (APPTAINER, ["apptainer", "exec", "--nv"]),
    ],
)
def test_one_process_of_a_batch_script(container: dict[str, str], inside: list[str], tree: Path) -> None:
    script = tree / "launch" / "batch.sh"
    script.write_text('source "$(dirname "$0")/env.sh"; printf "%s\\n" "${python[@]}"')
    result = subprocess.run(
        ["bash", "-euo", "pipefail", script], env={**os.environ, **container}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[: len(inside)] == inside


def test_a_port_that_somebody_uses_is_not_taken(tree: Path) -> None:
    command = ["bash", "-c", f'source "{tree}/launch/env.sh"; RANDOM=1; free_port']
    port = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    with socket.create_server(("127.0.0.1", port)):
        other = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert port != other


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("srun.sh", {}, "start it through salloc or sbatch"),
        (
            "mpirun.sh",
            {**ALLOCATION, "HOSTS": "node9"},
            "HOSTS=node9 contradicts SLURM_JOB_NODELIST=node[3-4]",
        ),
        ("local.sh", {"PROGRAM": "tools/none.py"}, "PROGRAM=tools/none.py: there is no "),
        ("local.sh", PYXIS, "use launch/srun.sh"),
        ("mpirun.sh", PYXIS, "use launch/srun.sh"),
        ("local.sh", {"CONTAINER_IMAGE": "x"}, "CONTAINER_RUNTIME (pyxis or apptainer) is not"),
        (
            "local.sh",
            {**APPTAINER, "CONTAINER_RUNTIME": "docker"},
            "CONTAINER_RUNTIME=docker: expected pyxis or",
        ),
        (
            "local.sh",
            {"CONTAINER_RUNTIME": "pyxis"},
            "CONTAINER_RUNTIME=pyxis is set but CONTAINER_IMAGE is not",
        ),
        ("local.sh", {"CONTAINER_MOUNTS": "/a"}, "CONTAINER_MOUNTS=/a is set but CONTAINER_IMAGE is not"),
    ],
)
def test_settings_that_contradict_each_other(
    script: str, settings: dict[str, str], message: str, tree: Path
) -> None:
    result = run(tree, script, **settings)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.startswith(f"{script}: ")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    scripts = sorted(ROOT.glob("launch/*.sh"))
    result = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
