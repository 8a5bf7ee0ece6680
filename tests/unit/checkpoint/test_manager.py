"""Saving, finding and loading a run's checkpoints over real gloo ranks, also when something breaks."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_qwenvl.checkpoint.manager import CheckpointManager
from megatron_qwenvl.checkpoint.manifest import read_manifest
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks

from .cases import CONFIG, failing, join, load_newest, save_steps, state


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("ranks", "axis"), [(1, 0), (2, 1), (4, 0)])
def test_any_layout_reads_what_two_ranks_saved(tmp_path: Path, ranks: int, axis: int) -> None:
    run_ranks(2, save_steps, tmp_path, [5])
    loaded = run_ranks(ranks, load_newest, tmp_path, axis)
    assert loaded == [{"step": 5, "progress": {"step": 5}, "lr": 0.1, "log": ""}] * ranks


def test_manifest_names_every_file_and_the_layout(tmp_path: Path) -> None:
    run_ranks(2, save_steps, tmp_path, [5])
    checkpoint = tmp_path / "step_00000005"
    manifest = read_manifest(checkpoint)
    found = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {"manifest.json"}
    assert manifest.files.keys() == found
    assert (manifest.kind, manifest.origin, manifest.step) == ("training", "stage1", 5)
    assert manifest.layout == {"tensor": 1, "pipeline": 1, "data": 2}
    assert manifest.total_bytes == sum((checkpoint / name).stat().st_size for name in found)


def test_keeps_the_last_two_and_every_fourth_step(tmp_path: Path) -> None:
    run_ranks(1, lambda process: save_steps(process, tmp_path, [2, 4, 6, 8, 10, 11], keep_every=4))
    assert names(tmp_path) == [
        "latest", "step_00000004", "step_00000008", "step_00000010", "step_00000011"
    ]  # fmt: skip


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert run_ranks(1, load_newest, tmp_path / "new") == [None]


def load_as(process: ProcessInfo, folder: Path, config: RunConfig) -> str:
    join(process)
    manager = CheckpointManager(folder, config)
    newest = manager.latest()
    assert newest is not None
    return failing(lambda: manager.load(newest, state(0), state(0)))


def test_another_run_is_refused(tmp_path: Path) -> None:
    """A run directory that is used again for another stage or model."""
    run_ranks(1, save_steps, tmp_path, [5])
    other_stage = CONFIG.model_copy(update={"stage": "stage2"})
    assert (
        "expected training of stage2, found training of stage1"
        in run_ranks(1, load_as, tmp_path, other_stage)[0]
    )
    wider = CONFIG.model.model_copy(update={"decoder": CONFIG.model.decoder.model_copy(update={"heads": 2})})
    other_model = CONFIG.model_copy(update={"model": wider})
    assert "decoder.heads: expected 2, found 4" in run_ranks(1, load_as, tmp_path, other_model)[0]
    assert run_ranks(1, load_as, tmp_path, CONFIG) == [""]


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "bit flipped": flip_bit,
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("file", ["model/__1_0.distcp", "optimizer/.metadata", "manifest.json"])
def test_damage_is_named_and_the_older_checkpoint_used(tmp_path: Path, file: str, damage: Any) -> None:
    run_ranks(2, save_steps, tmp_path, [5, 6])
    damage(tmp_path / "step_00000006" / file)
    first, second = run_ranks(2, load_newest, tmp_path)
    assert first["step"] == second["step"] == 5
    assert f"damaged checkpoint: {tmp_path / 'step_00000006'}" in first["log"]
    assert first["log"].count("damaged checkpoint") == 1
    assert file in first["log"]


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    run_ranks(1, save_steps, tmp_path, [5])
    flip_bit(tmp_path / "step_00000005/model/__0_0.distcp")
    with pytest.raises(AssertionError, match="all 1 checkpoints are damaged"):
        run_ranks(1, load_newest, tmp_path)


def test_saving_a_damaged_step_again_replaces_it(tmp_path: Path) -> None:
    run_ranks(1, save_steps, tmp_path, [5, 6])
    flip_bit(tmp_path / "step_00000006/model/__0_0.distcp")
    run_ranks(1, save_steps, tmp_path, [6])
    assert run_ranks(1, load_newest, tmp_path)[0]["step"] == 6
    assert names(tmp_path) == ["latest", "step_00000005", "step_00000006"]


def fail_on_one_rank(process: ProcessInfo, folder: Path, asynchronous: bool) -> list[str]:
    """Rank 1 may write no file beyond 1 kB during the second of three saves."""
    join(process)
    manager = CheckpointManager(folder, CONFIG, asynchronous=asynchronous)

    def save(step: int) -> None:
        manager.save(step, state(step), {**state(step + 0.5), "lr": 0.1}, {"step": step})
        manager.wait()

    outcomes = [failing(lambda: save(1))]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if process.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, unlimited[1]))
    outcomes.append(failing(lambda: save(2)))
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    dist.barrier()
    outcomes.append(" ".join(names(folder)))
    dist.barrier()
    outcomes.append(failing(lambda: save(3)))
    return outcomes


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_cannot_write_fails_the_save_everywhere(tmp_path: Path, asynchronous: bool) -> None:
    for first, second, left, third in run_ranks(2, fail_on_one_rank, tmp_path, asynchronous):
        assert first == ""
        assert "step 2 was not written: rank 1: OSError: [Errno 27] File too large" in second
        assert left == "latest step_00000001"
        assert third == ""
    assert run_ranks(1, load_newest, tmp_path)[0]["step"] == 3


def save_in_background(process: ProcessInfo, folder: Path) -> None:
    """Change the weights while the save of their old values has not begun to write."""
    join(process)
    manager = CheckpointManager(folder, CONFIG, asynchronous=True)
    released = threading.Event()
    manager._thread.submit(released.wait)
    model, optimizer = state(7), {**state(7.5), "lr": 0.1}
    live = [model["matrix"].data, optimizer["matrix"].data]
    assert manager.save(7, model, optimizer, {"step": 7}) is None
    assert manager.poll() is None
    for tensor in live:
        tensor.zero_()
    released.set()
    report = manager.wait()
    assert report is not None and report.step == 7 and report.stall_seconds <= report.total_seconds


def test_a_background_save_keeps_the_values_of_its_step(tmp_path: Path) -> None:
    run_ranks(2, save_in_background, tmp_path)
    assert run_ranks(1, load_newest, tmp_path)[0]["step"] == 7


def inconsistent_shards(process: ProcessInfo, folder: Path) -> str:
    join(process)
    model = state(1)
    model["matrix"].replica_id = 1  # nobody is the main replica
    manager = CheckpointManager(folder, CONFIG)
    return failing(lambda: manager.save(1, model, state(1), {}))


def test_shards_that_do_not_cover_a_tensor_are_refused_on_all_ranks(tmp_path: Path) -> None:
    for outcome in run_ranks(2, inconsistent_shards, tmp_path):
        assert "inconsistent shards" in outcome and "matrix" in outcome
    assert names(tmp_path) == []


KILLED_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree", "os.rmdir"}


def save_and_die(process: ProcessInfo, folder: Path, at: int) -> None:
    """Save step 6 over a run with step 5 and kill the process at its `at`-th act on the checkpoint folder."""
    join(process)
    manager = CheckpointManager(folder, CONFIG)
    acts = [0]

    def die(event: str, arguments: tuple[Any, ...]) -> None:
        if event in KILLED_EVENTS and str(folder) in str(arguments[0]):
            acts[0] += 1
            if acts[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    manager.save(6, state(6), {**state(6.5), "lr": 0.1}, {"step": 6})


def test_a_kill_at_any_moment_of_a_save_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    outcomes = []
    for at in range(1, 60):
        folder = tmp_path / str(at)
        run_ranks(1, save_steps, folder, [4, 5])
        died = failing(lambda folder=folder, at=at: run_ranks(1, save_and_die, folder, at)) != ""
        step = run_ranks(1, load_newest, folder)[0]["step"]
        outcomes.append((died, step))
        assert not list(folder.glob("*.tmp")), "leftovers are removed by the next run"
        if not died:
            break
    died, steps = zip(*outcomes, strict=True)
    assert len(died) > 15 and not died[-1] and all(died[:-1])
    assert set(steps) == {5, 6} and list(steps) == sorted(steps)
