"""Every command that a message of the data names is run, and helps."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_qwenvl.commands import index_shards
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.records.tasks import TASKS
from megatron_qwenvl.data.rendering.tokenizer import load_tokenizer
from megatron_qwenvl.data.sampling.sampler import open_training_sampler
from megatron_qwenvl.data.shards import index as index_module
from megatron_qwenvl.data.shards.index import index_path, load_index
from megatron_qwenvl.data.shards.indexing import IndexJob, index_directory
from tests.unit.data.conftest import QWEN_VOCABULARY
from tests.unit.data.data_cases import mixed_samples, run_config, write_shard, write_source

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[4]


def change_index(shard: Path, **changes: object) -> None:
    """Change what an index says about itself; None removes it."""
    with np.load(index_path(shard)) as stored:
        arrays = {name: stored[name] for name in stored.files}
    meta = {**json.loads(bytes(arrays["meta"])), **changes}
    arrays["meta"] = np.bytes_(json.dumps({name: value for name, value in meta.items() if value is not None}))
    np.savez_compressed(index_path(shard), **arrays)


def change_manifest(root: Path, **changes: object) -> None:
    path = root / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def older_index(root: Path) -> None:
    for shard in root.glob("*.tar"):
        change_index(shard, format=1, rendering=None, task_names=None)
    change_manifest(root, format=1)


def older_rendering(root: Path) -> None:
    for shard in root.glob("*.tar"):
        change_index(shard, rendering=1)
    change_manifest(root, rendering=1)


def removed_task(root: Path) -> None:
    change_index(root / "000001.tar", task_names=["video", *TASKS])


def old_index_beside_new_manifest(root: Path) -> None:
    change_index(root / "000001.tar", format=1)


def missing_index(root: Path) -> None:
    index_path(root / "000001.tar").unlink()


def damaged_index(root: Path) -> None:
    path = index_path(root / "000001.tar")
    path.write_bytes(path.read_bytes()[:-100])


def index_of_another_shard(root: Path) -> None:
    shutil.copy(index_path(root / "000000.tar"), index_path(root / "000001.tar"))


def missing_manifest(root: Path) -> None:
    (root / "manifest.json").unlink()


def damaged_manifest(root: Path) -> None:
    (root / "manifest.json").write_text("[" * 100_000)


def other_tokenizer(root: Path) -> None:
    index_directory(root, IndexJob())


def new_shard(root: Path) -> None:
    write_shard(root / "000009.tar", mixed_samples(9))


def missing_shard(root: Path) -> None:
    (root / "000001.tar").unlink()


def other_shard(root: Path) -> None:
    write_shard(root / "000001.tar", mixed_samples(90))


def compressed_shard(root: Path) -> None:
    subprocess.run(["gzip", "000001.tar"], cwd=root, check=True)


def named_shard_in_capitals(root: Path) -> None:
    (root / "000001.tar").rename(root / "000001.TAR")


def truncated_shard(root: Path) -> None:
    shutil.copy(root / "000001.tar", root / "whole")
    os.truncate(root / "000001.tar", 5000)


def compressed_content(root: Path) -> None:
    subprocess.run("gzip 000001.tar && mv 000001.tar.gz 000001.tar", shell=True, cwd=root, check=True)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (older_index, "manifest.json: expected index format 2, found 1"),
    (older_rendering, "manifest.json: expected the text lengths of rendering version [0-9]+, found 1"),
    (removed_task, "expected the tasks caption, .*, found video"),
    (old_index_beside_new_manifest, "000001.index.npz: expected index format 2, found 1"),
    (missing_index, "000001.index.npz: no index"),
    (damaged_index, "000001.index.npz: damaged index"),
    (index_of_another_shard, "000001.tar: index and manifest differ"),
    (missing_manifest, "manifest.json: no manifest"),
    (damaged_manifest, "manifest.json: damaged manifest"),
    (other_tokenizer, "manifest.json: indexed with another tokenizer"),
    (new_shard, "000009.tar: shard is not in manifest.json"),
    (missing_shard, "000001.tar: shard of the manifest cannot be read: No such file or directory"),
    (other_shard, r"000001.tar: expected \d+ bytes as indexed, found \d+"),
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vocabulary whose path must be quoted."""
    return str(shutil.copy(QWEN_VOCABULARY, tmp_path_factory.mktemp("it's a vocabulary") / "qwen.tiktoken"))


@pytest.fixture
def run(tmp_path: Path, vocabulary: str) -> RunConfig:
    """A run over an indexed source in a directory whose name must be quoted, with a tokenizer of its own."""
    write_source(tmp_path / "my data", mixed_samples(20), tokenizer=vocabulary)
    config = run_config(tmp_path, {"my data": 1}, tokenizer=vocabulary)
    decoder = config.model.decoder.model_copy(update={"vocab_size": 151_936})
    return config.model_copy(update={"model": config.model.model_copy(update={"decoder": decoder})})


def open_all(config: RunConfig) -> int:
    """Open the data of a run and read every index; the number of samples."""
    sampler = open_training_sampler(config, load_tokenizer(config.data.tokenizer).fingerprint)
    shards = sampler.sources[0].directory.catalog.shards
    return sum(len(sampler.index(0, shard)) for shard in range(len(shards)))


def named_command(message: str) -> list[str]:
    """The command with which a message ends."""
    found = re.search(r"run (python tools/index_shards\.py .*)$", message)
    assert found, message
    return shlex.split(found[1])


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_command_that_a_message_names_helps(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], reason: str
) -> None:
    damage(Path(run.data.root, "my data"))
    with pytest.raises(DataError, match=reason) as caught:
        open_all(run)
    monkeypatch.setattr(sys, "argv", named_command(str(caught.value))[1:])
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert index_shards.main() == 0
    assert open_all(run) >= 10


def test_an_installed_package_names_its_console_script(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing_manifest(Path(run.data.root, "my data"))
    monkeypatch.setattr(index_module, "__file__", str(tmp_path / "megatron_qwenvl/data/shards/index.py"))
    with pytest.raises(DataError) as caught:
        open_all(run)
    command = shlex.split(str(caught.value).rpartition("; run ")[2])
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts[command[0]] == "megatron_qwenvl.commands.index_shards:run"
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert index_shards.main() == 0
    assert open_all(run) >= 10


def test_the_command_for_an_older_index_works_in_a_shell(run: RunConfig) -> None:
    older_index(Path(run.data.root, "my data"))
    with pytest.raises(DataError) as caught:
        open_all(run)
    command = shlex.join([sys.executable, *named_command(str(caught.value))[1:]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, shell=True, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert "2 shards (2 indexed now)" in result.stdout
    assert open_all(run) == 20


def test_a_task_keeps_its_name_when_others_come_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = mixed_samples(18)
    write_source(tmp_path / "s", samples, per_shard=18)
    monkeypatch.setattr(index_module, "TASKS", ("video", *TASKS))
    tasks = load_index(tmp_path / "s" / "000000.tar").arrays["tasks"]
    expected = [json.loads(item["json"])["task"] for item in samples]
    assert [("video", *TASKS)[task] for task in tasks] == expected


@pytest.mark.parametrize(
    ("damage", "reason", "mend"),
    [
        (
            compressed_shard,
            r"000001.tar.gz: compressed tars are not read; decompress it \(gzip -d\)",
            "gzip -d *.gz",
        ),
        (compressed_shard, "or move it away", "rm *.gz"),
        (named_shard_in_capitals, "000001.TAR: shards are named .*; rename it", "mv 000001.TAR 000001.tar"),
        (
            truncated_shard,
            "000001.tar: damaged or truncated tar: .*; replace the shard",
            "mv whole 000001.tar",
        ),
        (truncated_shard, "or move it away", "rm 000001.tar"),
        (
            compressed_content,
            "found gzip, which is to be decompressed",
            "mv 000001.tar x.gz; gzip -d x; mv x 000001.tar",
        ),
    ],
)
def test_what_a_message_asks_for_before_its_command_helps(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None], reason: str, mend: str,
) -> None:  # fmt: skip
    root = Path(run.data.root, "my data")
    damage(root)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    arguments = ["index_shards.py", str(root), "--tokenizer", str(run.data.tokenizer)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert index_shards.main() == 1
    assert re.search(
        reason.split("; replace")[0] if "replace" in reason else "error: .*000001", capsys.readouterr().err
    )
    with pytest.raises(DataError, match=reason) as caught:
        open_all(run)
    subprocess.run(mend, shell=True, cwd=root, check=True)
    monkeypatch.setattr(sys, "argv", named_command(str(caught.value))[1:])
    assert index_shards.main() == 0
    assert open_all(run) >= 10


def test_a_shard_that_changed_without_a_trace_is_indexed_again_with_the_command(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(run.data.root, "my data", "000001.tar")
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    fingerprint = load_tokenizer(run.data.tokenizer).fingerprint
    with pytest.raises(DataError, match="expected digest") as caught:
        open_training_sampler(run, fingerprint, verify_digests=True)
    monkeypatch.setattr(sys, "argv", named_command(str(caught.value))[1:])
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert index_shards.main() == 0
    open_training_sampler(run, fingerprint, verify_digests=True)
