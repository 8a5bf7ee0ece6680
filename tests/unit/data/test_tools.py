"""The command lines, run as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_qwenvl.config.load import load_config
from megatron_qwenvl.data.rendering.tokenizer import load_tokenizer
from megatron_qwenvl.data.sampling.sampler import open_training_sampler
from megatron_qwenvl.data.sampling.step_description import describe_step
from megatron_qwenvl.data.shards.indexing import IndexJob, index_directory

from .conftest import QWEN_VOCABULARY
from .data_cases import mixed_samples, write_shard

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(4):
        write_shard(
            tmp_path / "caption" / f"{number:06d}.tar",
            mixed_samples(10, seed=number, tasks=("caption", "vqa")),
        )
    return tmp_path / "caption"


def test_indexing_in_processes_gives_what_one_process_gives(shards: Path) -> None:
    result = run_tool("index_shards.py", shards, "--workers", 2)
    assert (result.returncode, result.stderr) == (0, "")
    assert "4/4 shards" in result.stdout
    assert "40 samples with 40 images in 4 shards (4 indexed now), 0 samples skipped" in result.stdout
    manifest = (shards / "manifest.json").read_bytes()
    index_directory(shards, IndexJob(force=True))
    assert (shards / "manifest.json").read_bytes() == manifest


def test_indexing_over_mpi_ranks_gives_what_one_process_gives(shards: Path) -> None:
    pytest.importorskip("mpi4py")
    if not (mpirun := shutil.which("mpirun")):
        pytest.skip("no mpirun")
    index_directory(shards, IndexJob())
    manifest = (shards / "manifest.json").read_bytes()
    command = [
        mpirun,
        "-n",
        "2",
        sys.executable,
        str(ROOT / "tools" / "index_shards.py"),
        str(shards),
        "--force",
    ]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **as_root}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("(4 indexed now)") == 1
    assert (shards / "manifest.json").read_bytes() == manifest


def test_indexing_under_torchrun_is_done_by_rank_0(shards: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "PROGRAM": "tools/index_shards.py", "NPROC": "2"}
    command = [ROOT / "launch" / "local.sh", shards, "--workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("(4 indexed now)") == 1 and "(0 indexed now)" not in result.stdout


def test_ranks_that_do_not_see_each_other_index_nothing(shards: Path, tmp_path: Path) -> None:
    """An MPI library that does not know the launcher puts every rank in a world of its own."""
    (tmp_path / "mpi4py.py").write_text("class MPI:\n    class COMM_WORLD:\n        size = 1\n")
    step = {"STEP_ID": "0", "STEP_NUM_TASKS": "2", "STEP_TASKS_PER_NODE": "2"}
    task = {"PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    slurm = {f"SLURM_{name}": value for name, value in {**step, **task}.items()}
    environment = {**os.environ, **slurm, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, ROOT / "tools" / "index_shards.py", shards]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 2
    assert "slurm started 2 ranks but mpi4py sees 1" in result.stderr
    assert not (shards / "manifest.json").exists()


def test_a_truncated_shard_is_named_and_the_rest_indexed(shards: Path) -> None:
    os.truncate(shards / "000002.tar", 5000)
    result = run_tool("index_shards.py", shards, "--workers", 1)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "000002.tar: damaged or truncated tar" in result.stderr
    assert "30 samples with 30 images in 3 shards" in result.stdout
    assert "1 shards failed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere: no such directory"),
        ([".", "--tokenizer", "none"], "none: cannot read the vocabulary"),
    ],
)
def test_indexing_nothing_says_so_in_one_line(shards: Path, arguments: list[str], reason: str) -> None:
    target = [str(shards) if argument == "." else argument for argument in arguments]
    result = run_tool("index_shards.py", *target, "--workers", 1)
    assert result.returncode == 1
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1


def test_check_compares_digests(shards: Path) -> None:
    index_directory(shards, IndexJob(QWEN_VOCABULARY))
    assert run_tool("index_shards.py", shards, "--check", "--tokenizer", QWEN_VOCABULARY).returncode == 0
    path = shards / "000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    result = run_tool("index_shards.py", shards, "--check", "--tokenizer", QWEN_VOCABULARY)
    assert result.returncode == 1
    assert "000001.tar: expected digest" in result.stderr


OVERRIDES = ("--data.global_batch_size", "16", "--seed", "3")


def test_show_step_prints_the_step_of_the_plan(shards: Path) -> None:
    index_directory(shards, IndexJob())
    overrides = [*OVERRIDES, "--data.root", str(shards.parent)]
    result = run_tool(
        "show_step.py", "--recipe", "tiny_stage1", "--step", 7, "--data_parallel", 2, "--json", *overrides
    )
    assert (result.returncode, result.stderr) == (0, "")
    sampler = open_training_sampler(load_config("tiny_stage1", overrides), load_tokenizer().fingerprint)
    described = json.loads(result.stdout)
    assert described == describe_step(sampler, 7, 2)
    assert described["step"] == 7
    assert sum(len(pack["samples"]) for pack in described["packs"]) == 16
    text = run_tool("show_step.py", "--recipe", "tiny_stage1", "--step", 7, *overrides).stdout
    assert text.startswith("step 7: 16 samples in ")
    assert all(sample["key"] in text for pack in described["packs"] for sample in pack["samples"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--recipe", "tiny_stage1", "--step", "0"], "caption: no such directory"),
        (["--recipe", "nonsense", "--step", "0"], "nonsense"),
        (["--recipe", "tiny_stage1", "--step", "-1"], "expected --step 0 or more"),
    ],
)
def test_show_step_explains_bad_input(tmp_path: Path, arguments: list[str], reason: str) -> None:
    result = run_tool("show_step.py", *arguments, "--data.root", str(tmp_path))
    assert result.returncode != 0
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
