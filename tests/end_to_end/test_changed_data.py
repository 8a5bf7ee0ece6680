"""Runs whose data changes on the way, and runs that go back: what they train on, say and leave behind."""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_qwenvl.checkpoint.run.start import find_start
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import Manifest, read_manifest, write_manifest
from megatron_qwenvl.checkpoint.storage.run_folder import find_checkpoint
from megatron_qwenvl.commands import run_progress
from megatron_qwenvl.commands.show_step import open_sampler
from megatron_qwenvl.config.cli import RunArguments
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.shards.indexing import IndexJob, index_directory
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.preflight.inputs import check_inputs
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.loop import Trainer
from tests.distributed.harness import run_ranks
from tests.unit.data.data_cases import random_record, sample, write_shard

from .training_cases import records, run_config

TOOLS = Path(__file__).parents[2] / "tools"


def write_shards(folder: Path, first: int, last: int) -> None:
    """Shards of 8 samples of text, numbered over all shards; indexes the directory."""
    rng = random.Random(first)
    for shard in range(first, last):
        rows = [sample(f"{8 * shard + row:05d}", random_record("text", rng)) for row in range(8)]
        write_shard(folder / f"{shard:03d}.tar", rows)
    index_directory(folder, IndexJob())


class _Lines(logging.Handler):
    """The warnings of this process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def build(process: ProcessInfo, config: RunConfig, from_step: int | None) -> tuple[Trainer, list[str]]:
    runtime = start_engine(config, process)
    handler = _Lines()
    logging.getLogger("megatron_qwenvl").addHandler(handler)
    return Trainer.build(config, runtime, from_step=from_step), handler.lines


def planned(trainer: Trainer, steps: range) -> list[list[str]]:
    """Keys of the samples of each step, in the order of the batch."""
    sampler = trainer.loader.sampler
    batches = [sampler.global_batch(step) for step in steps]
    return [[sampler.key(batch.samples, row) for row in range(len(batch.samples))] for batch in batches]


def train(process: ProcessInfo, config: RunConfig, from_step: int | None = None) -> dict[str, Any]:
    """Train; returns the first and last step, the samples of each in between, and the warnings."""
    trainer, warnings = build(process, config, from_step)
    first = trainer.progress.step
    trainer.run()
    steps = range(first, trainer.progress.step)
    return {"first": first, "steps": planned(trainer, steps), "warnings": warnings}


def killed(process: ProcessInfo, config: RunConfig, last: int) -> list[list[str]]:
    """Set the run up and end without a save; returns what the steps up to `last` would have had."""
    trainer, _ = build(process, config, None)
    return planned(trainer, range(trainer.progress.step, last))


def refused(process: ProcessInfo, config: RunConfig, from_step: int | None = None) -> str:
    try:
        build(process, config, from_step)
    except (DataError, CheckpointError) as error:
        return str(error)
    return "started"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def preflight(config: RunConfig, from_step: int | None = None) -> list[str]:
    """What preflight says of data and checkpoints."""
    return [finding.line() for finding in check_inputs(RunArguments(config, from_step))]


def show_step(run: Path, step: int) -> tuple[Counter[str], str]:
    """The keys of a step as the tool has them, and what it says on standard error."""
    command = [sys.executable, TOOLS / "show_step.py", "--run", run, "--step", str(step), "--json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    packs = json.loads(done.stdout)["packs"]
    return Counter(entry["key"] for pack in packs for entry in pack["samples"]), done.stderr


def test_a_run_over_growing_and_shrinking_data_shows_every_sample_once(tmp_path: Path) -> None:
    """Shards added, then the batch size changed and shards removed, in one epoch: 8 shards, 12, 11 of them."""
    folder, run = tmp_path / "data/mixed", tmp_path / "run"
    write_shards(folder, 0, 8)
    small = ("--data.shuffle_window", "2", "--train.steps", "14")

    def config(*overrides: str, world: int = 1) -> RunConfig:
        return run_config(tmp_path / "data", run, *small, *overrides, world=world)

    (first,) = run_ranks(1, train, config("--train.stop_after", "3"))
    assert first["warnings"] == []
    write_shards(folder, 8, 12)

    stopping = config("--train.stop_after", "3", "--data.on_change", "stop")
    before = tree(run)
    (reason,) = run_ranks(1, refused, stopping)
    added = "data set mixed: 4 shards (008.tar, 009.tar, 010.tar, ...) added (32 samples)"
    assert "data.on_change stop: since " in reason and added in reason
    assert tree(run) == before
    assert any(line.startswith("failure") and added in line for line in preflight(stopping)), preflight(
        stopping
    )
    assert any(line.startswith("warning") and added in line for line in preflight(config()))

    more = config("--train.stop_after", "5", world=2)
    planned_twice = [run_ranks(2, killed, more, 5)[rank] for rank in (0, 1)]
    second = run_ranks(2, train, more)
    assert [line for line in second[0]["warnings"] if "data set" in line] == [
        f"{added}: part of this epoch from step 3 on"
    ]
    assert second[0]["steps"] == second[1]["steps"] == planned_twice[0] == planned_twice[1]
    seen = Counter(int(key) // 8 for start in (first, second[0]) for step in start["steps"] for key in step)
    shard = min(seen, key=lambda number: seen[number])  # one whose samples came in part, if there is one
    (folder / f"{shard:03d}.tar").unlink()
    (folder / f"{shard:03d}.index.npz").unlink()
    index_directory(folder, IndexJob())
    (third,) = run_ranks(1, train, config("--data.global_batch_size", "6"))
    told = "\n".join(third["warnings"])
    lost = 8 - seen[shard]
    assert f"1 shard ({shard:03d}.tar) removed (8 samples, {lost} of them not seen in this epoch)" in told
    assert "data.global_batch_size: was 8, now 6 from step 5 on; 40 samples were consumed" in told

    came = [key for start in (first, second[0], third) for step in start["steps"] for key in step]
    epoch = [f"{number:05d}" for number in range(96)]
    gone = [key for key in epoch[8 * shard : 8 * shard + 8] if key not in came]
    assert len(gone) == lost
    assert set(epoch) - set(came[: 96 - len(gone)]) == set(gone)
    assert len(set(came[: 96 - len(gone)])) == 96 - len(gone)

    assert [record["samples"] for record in records(run)] == [8] * 5 + [6] * 9
    assert show_step(run, 11) == (Counter(third["steps"][6]), "")
    sampler = open_sampler(argparse.Namespace(run=run), [])
    assert [sampler.key(sampler.global_batch(4).samples, row) for row in range(8)] == second[0]["steps"][1]
    with pytest.raises(
        DataError, match=rf"{shard:03d}\.tar: this step was made with a shard that is gone since"
    ):
        [sampler.global_batch(step) for step in range(5)]


def test_a_checkpoint_without_a_record_goes_on_as_it_did(tmp_path: Path) -> None:
    folder, run = tmp_path / "data/mixed", tmp_path / "run"
    write_shards(folder, 0, 4)
    config = run_config(tmp_path / "data", run, "--train.steps", "4", "--train.stop_after", "2")
    (straight,) = run_ranks(
        1, train, run_config(tmp_path / "data", tmp_path / "straight", "--train.steps", "4")
    )
    run_ranks(1, train, config)
    checkpoint = find_checkpoint(run)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"]["data.json"], manifest["digest"]
    (checkpoint / "data.json").unlink()
    write_manifest(checkpoint, Manifest.model_validate(manifest))
    (resumed,) = run_ranks(1, train, run_config(tmp_path / "data", run, "--train.steps", "4"))
    assert resumed["steps"] == straight["steps"][2:]
    (line,) = [line for line in resumed["warnings"] if "data" in line]
    assert "does not record its data" in line
    assert [r["loss"] for r in records(run)] == [r["loss"] for r in records(tmp_path / "straight")]


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """Data, and a run of six steps of ten with checkpoints of the steps 2, 4 and 6."""
    root = tmp_path_factory.mktemp("rewind")
    write_shards(root / "data/mixed", 0, 12)
    config = run_config(
        root / "data",
        root / "run",
        "--checkpoint.interval",
        "2",
        "--checkpoint.keep_last",
        "9",
        "--train.stop_after",
        "6",
    )
    (trained,) = run_ranks(1, train, config)
    return root / "data", root / "run", trained


def test_a_run_goes_back_without_the_data_of_some_steps(
    six_steps: tuple[Path, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run, straight = six_steps
    run = shutil.copytree(run, tmp_path / "run")
    config = run_config(
        data,
        run,
        "--checkpoint.interval",
        "2",
        "--checkpoint.keep_last",
        "9",
        "--train.stop_after",
        "5",
        "--data.skip_steps",
        "[[2, 3]]",
    )
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (back,) = run_ranks(1, train, config, 2)
    assert back["first"] == 2
    assert back["steps"][:2] == straight["steps"][4:6]
    told = "\n".join(back["warnings"])
    kept = run / "checkpoints/rewound_001"
    assert f"went back from step 6 to 2: 2 newer checkpoints are kept in {kept}" in told
    assert "data.skip_steps: [2, 3] added: the data of these steps is left out" in told
    assert [read_manifest(find_checkpoint(kept / f"step_0000000{step}")).step for step in (4, 6)] == [4, 6]
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == [
        "step_00000002", "step_00000004", "step_00000005"
    ]  # fmt: skip
    steps = [record["step"] for record in records(run)]
    assert steps == [0, 1, 2, 3, 4, 5, 2, 3, 4]
    (event,) = records(run, "rewind")
    assert (event["step"], event["from_step"], event["folder"]) == (2, 6, str(kept))
    rates = [record["lr"] for record in records(run)]
    assert rates[6:9] == rates[2:5]
    assert run_progress.describe_run(run).startswith("step 5/10 |")
    assert [record["step"] for record in run_progress.recent_records(run)] == [2, 3, 4]

    # The requeued job repeats its arguments, and goes on from its own progress.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    more = config.model_copy(update={"train": config.train.model_copy(update={"stop_after": 6})})
    assert find_start(more, 2).checkpoint == run / "checkpoints/step_00000005"
    (again,) = run_ranks(1, train, more, 2)
    assert (again["first"], len(again["steps"])) == (5, 1)
    # Another job with the same arguments means it.
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert find_start(more, 2).checkpoint == run / "checkpoints/step_00000002"
    (once_more,) = run_ranks(1, train, more, 2)
    assert once_more["first"] == 2
    assert sorted(path.name for path in (run / "checkpoints/rewound_002").iterdir()) == [
        "rewind.json", "step_00000004", "step_00000005", "step_00000006"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "reason"), [(3, "expected the step of a checkpoint of the run, found 2, 4, 6"), (4, "damaged")]
)
def test_going_back_to_what_is_not_there_changes_nothing(
    step: int, reason: str, six_steps: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    data, run, _ = six_steps
    run = shutil.copytree(run, tmp_path / "run")
    damaged = run / "checkpoints/step_00000004/data.json"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b" ")
    before = tree(run)
    found = run_ranks(2, refused, run_config(data, run, world=2), step)
    assert all(reason in text for text in found), found
    if step == 3:
        assert any(reason in line for line in preflight(run_config(data, run), step))
    assert tree(run) == before
