"""Saving, finding and loading a run's checkpoints over real gloo ranks, also when something breaks."""

from __future__ import annotations

import io
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_qwenvl.checkpoint.run import checkpoints_folder, damage, manager, sharded_folder
from megatron_qwenvl.checkpoint.run.damage import find_damage, split_by_bytes
from megatron_qwenvl.checkpoint.run.manager import CheckpointManager
from megatron_qwenvl.checkpoint.run.ranks import Ranks
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import read_manifest
from megatron_qwenvl.checkpoint.storage.run_folder import find_checkpoint
from megatron_qwenvl.checkpoint.storage.writing import FileRecord
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.engine import checkpoint_state
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks

from ..cases import CONFIG, failing, join, load_newest, save_steps, saving, state


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
    assert manifest.steps == CONFIG.train.steps
    assert manifest.parallel_sizes == {"tensor": 1, "pipeline": 1, "data": 2}
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
    manager = CheckpointManager(folder, saving(asynchronous=asynchronous))

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
    outcomes.append(f"{' '.join(names(folder))} -> {(folder / 'latest').read_text().strip()}")
    dist.barrier()
    outcomes.append(failing(lambda: save(3)))
    return outcomes


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_cannot_write_fails_the_save_everywhere(tmp_path: Path, asynchronous: bool) -> None:
    for first, second, left, third in run_ranks(2, fail_on_one_rank, tmp_path, asynchronous):
        assert first == ""
        assert "step 2 was not written: rank 1: OSError: [Errno 27] File too large" in second
        assert left == "latest step_00000001 -> step_00000001"
        assert third == ""
    assert run_ranks(1, load_newest, tmp_path)[0]["step"] == 3


def without_memory(process: ProcessInfo, folder: Path) -> list[str]:
    """Rank 1 has no room for the copies of the second of three asynchronous saves."""
    join(process)
    saves = CheckpointManager(folder, saving(asynchronous=True))

    def save(step: int) -> None:
        saves.save(step, state(step), {**state(step + 0.5), "lr": 0.1}, {"step": step})
        saves.wait()

    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    outcomes = [failing(lambda: save(1))]
    copy = checkpoint_state.host_copy
    if process.rank == 1:
        checkpoint_state.host_copy = refuse  # type: ignore[assignment]
    outcomes.append(failing(lambda: save(2)))
    checkpoint_state.host_copy = copy
    dist.barrier()
    outcomes.append(" ".join(names(folder)))
    dist.barrier()
    return [*outcomes, failing(lambda: save(3))]


def test_a_rank_without_memory_fails_the_save_everywhere(tmp_path: Path) -> None:
    for first, second, left, third in run_ranks(2, without_memory, tmp_path):
        assert (first, third) == ("", "")
        assert "cannot be copied to host memory: rank 1: MemoryError: no room" in second
        assert left == "latest step_00000001"
    assert run_ranks(1, load_newest, tmp_path)[0]["step"] == 3


def slowly(action: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return action(*args)

    return slow


def save_and_check_slowly(process: ProcessInfo, folder: Path) -> str:
    """The disk of rank 1 takes longer than a collective of training may."""
    join(process, timeout_seconds=2)
    saves = CheckpointManager(folder, CONFIG)
    if process.rank == 1:
        sharded_folder.FolderSave.write = slowly(sharded_folder.FolderSave.write, 1.5)  # type: ignore[method-assign]
        damage.file_problem = slowly(damage.file_problem, 1)
    saves.save(5, state(5), {**state(5.5), "lr": 0.1}, {"step": 5})
    newest = saves.latest()
    assert newest is not None
    return newest.name


def test_ranks_wait_longer_for_a_disk_than_for_each_other_in_training(tmp_path: Path) -> None:
    assert run_ranks(2, save_and_check_slowly, tmp_path) == ["step_00000005"] * 2


def check_blindly(process: ProcessInfo, checkpoint: Path) -> list[str]:
    """Rank 1 cannot read the manifest."""
    join(process)

    def refuse(path: Path) -> None:
        raise CheckpointError(f"{path}: cannot be read (Stale file handle)")

    if process.rank == 1:
        damage.read_manifest = refuse  # type: ignore[assignment]
    return find_damage(checkpoint, Ranks(1))


def test_what_a_rank_cannot_check_is_a_problem(tmp_path: Path) -> None:
    run_ranks(1, save_steps, tmp_path, [5])
    checkpoint = tmp_path / "step_00000005"
    expected = [f"{checkpoint}: cannot be read (Stale file handle)"]
    assert run_ranks(2, check_blindly, checkpoint) == [expected] * 2


def test_ranks_check_equal_shares_of_the_bytes() -> None:
    sizes = {"large": 1000, **{f"small {i}": 10 for i in range(100)}, "empty": 0}
    files = {name: FileRecord(bytes=size, sha256="") for name, size in sizes.items()}
    dealt = split_by_bytes(files, 4)
    assert sorted(name for share in dealt for name in share) == sorted(files)
    loads = [sum(record.bytes for record in share.values()) for share in dealt]
    assert loads == [1000, 340, 330, 330]


def report_of_a_save(process: ProcessInfo, folder: Path) -> tuple[float, float]:
    join(process)
    report = CheckpointManager(folder, CONFIG).save(1, state(1), state(1), {}, began=time.monotonic() - 5)
    assert report is not None
    return report.stall_seconds, report.total_seconds


def test_the_stall_begins_where_training_stopped(tmp_path: Path) -> None:
    ((stall, total),) = run_ranks(1, report_of_a_save, tmp_path)
    assert stall >= 5 and total >= 5


def save_gathered(process: ProcessInfo, folder: Path) -> None:
    """Change the optimizer's state, which megatron-core has copied already, before it is written."""
    join(process)
    saves = CheckpointManager(folder, saving(asynchronous=True))
    released = threading.Event()
    saves._thread.submit(released.wait)
    optimizer = {**state(6.5), "lr": 0.1, "param_state_sharding_type": "fully_reshardable"}
    live = optimizer["matrix"].data
    saves.save(7, state(7), optimizer, {"step": 7})
    live += 1
    released.set()
    saves.wait()


def test_gathered_optimizer_state_is_not_copied_again(tmp_path: Path) -> None:
    run_ranks(1, save_gathered, tmp_path)
    assert run_ranks(1, load_newest, tmp_path)[0]["step"] == 7


def save_in_background(process: ProcessInfo, folder: Path) -> None:
    """Change the weights while the save of their old values has not begun to write."""
    join(process)
    manager = CheckpointManager(folder, saving(asynchronous=True))
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


def failing_on_main(process: ProcessInfo, folder: Path, what: str) -> tuple[int, str]:
    """Save step 6 where the function `what` fails; returns the reported step and the log."""
    join(process)
    log = io.StringIO()
    logging.getLogger("megatron_qwenvl").addHandler(logging.StreamHandler(log))
    saves = CheckpointManager(folder, CONFIG)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    setattr(checkpoints_folder, what, refuse)
    report = saves.save(6, state(6), {**state(6.5), "lr": 0.1}, {"step": 6})
    assert report is not None
    return report.step, log.getvalue()


def test_a_save_in_place_is_a_success_without_pointer_and_retention(tmp_path: Path) -> None:
    for what, warning in {
        "replace_bytes": "does not name step_00000006, the newest checkpoint: [Errno 28]",
        "remove_old_checkpoints": "older checkpoints were not removed: [Errno 28]",
    }.items():
        folder = tmp_path / what
        run_ranks(1, save_steps, folder, [4, 5])
        assert run_ranks(2, failing_on_main, folder, what)[0][0] == 6
        ((_, log),) = run_ranks(1, failing_on_main, folder, what)
        assert warning in log
        assert find_checkpoint(folder).name == "step_00000006"
        assert run_ranks(1, load_newest, folder)[0]["step"] == 6


def test_the_pointer_is_repaired_when_a_run_starts(tmp_path: Path) -> None:
    """As a crash between giving the name and moving the pointer leaves it."""
    run_ranks(1, save_steps, tmp_path / "checkpoints", [5, 6])
    pointer = tmp_path / "checkpoints/latest"
    pointer.write_text("step_00000005\n")
    assert find_checkpoint(tmp_path).name == "step_00000006"
    run_ranks(2, load_newest, tmp_path / "checkpoints")
    assert pointer.read_text() == "step_00000006\n"
    pointer.unlink()
    assert find_checkpoint(tmp_path).name == "step_00000006"


def resume_and_save(process: ProcessInfo, folder: Path, step: int) -> str:
    """What is resumed from before saving `step`."""
    join(process)
    saves = CheckpointManager(folder, CONFIG)
    newest = saves.latest()
    assert newest is not None
    saves.save(step, state(step), {**state(step + 0.5), "lr": 0.1}, {"step": step})
    return newest.name


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    """Of the last two one is damaged; the good one that was resumed from stays beside the new one."""
    run_ranks(1, save_steps, tmp_path, [4, 5, 6])
    flip_bit(tmp_path / "step_00000006/model/__0_0.distcp")
    assert run_ranks(1, resume_and_save, tmp_path, 7) == ["step_00000005"]
    assert names(tmp_path) == ["latest", "step_00000005", "step_00000007"]
    flip_bit(tmp_path / "step_00000007/model/__0_0.distcp")
    assert run_ranks(1, load_newest, tmp_path)[0]["step"] == 5


def alone_or_together(process: ProcessInfo, folder: Path, ranks: list[int]) -> list[bool]:
    """End with a save going on, on `ranks` only: whether it was completed."""
    join(process)
    manager.TOGETHER_SECONDS = 1.0
    saves = CheckpointManager(folder, saving(asynchronous=True))
    saves.save(5, state(5), {**state(5.5), "lr": 0.1}, {"step": 5})
    return [saves.wait_if_all_arrive() is not None for _ in ranks if process.rank in ranks]


def test_the_last_save_is_completed_if_all_ranks_end_alike(tmp_path: Path) -> None:
    assert run_ranks(2, alone_or_together, tmp_path / "one", [1]) == [[], [False]]
    assert run_ranks(2, alone_or_together, tmp_path / "all", [0, 1])[0][0]
    assert run_ranks(1, load_newest, tmp_path / "all")[0]["step"] == 5


def fail_to_move_into_place(process: ProcessInfo, folder: Path, what: str) -> list[str]:
    """Save step 5 again and step 6 where the last acts of a save fail: writing the manifest, or giving the name."""
    join(process)
    saves = CheckpointManager(folder, CONFIG)
    rename = Path.rename

    def refuse(path: Path, *arguments: Any) -> Path:
        if what == "write_manifest" or path.suffix == ".tmp":
            raise OSError(28, "No space left on device")
        return rename(path, *arguments)

    if what == "write_manifest":
        checkpoints_folder.write_manifest = refuse  # type: ignore[assignment]
    else:
        Path.rename = refuse  # type: ignore[method-assign, assignment]

    def save(step: int) -> None:
        saves.save(step, state(1), {**state(1.5), "lr": 0.1}, {"step": step})

    return [failing(lambda: save(5)), failing(lambda: save(6))]


@pytest.mark.parametrize("what", ["write_manifest", "rename"])
def test_a_save_that_cannot_be_put_in_place_changes_nothing(what: str, tmp_path: Path) -> None:
    run_ranks(1, save_steps, tmp_path, [4, 5])
    for errors in run_ranks(2, fail_to_move_into_place, tmp_path, what):
        assert all("cannot be moved into place: rank 0: OSError: [Errno 28]" in error for error in errors)
    assert names(tmp_path) == ["latest", "step_00000004", "step_00000005"]
    assert (tmp_path / "latest").read_text() == "step_00000005\n"
    assert run_ranks(1, load_newest, tmp_path)[0]["step"] == 5


EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree", "os.rmdir"}
RENAMING_EVENTS = {"os.rename", "shutil.rmtree"}


def save_and_die(process: ProcessInfo, folder: Path, step: int, events: set[str], at: int) -> None:
    """Save `step` over a run with step 5, and kill rank 0 at its `at`-th act of the given kinds on the folder; several
    ranks save in the background."""
    join(process)
    saves = CheckpointManager(folder, saving(asynchronous=process.world_size > 1))
    acts = [0]

    def die(event: str, arguments: tuple[Any, ...]) -> None:
        if event in events and str(folder) in str(arguments[0]):
            acts[0] += 1
            if acts[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    if process.rank == 0:
        sys.addaudithook(die)
    saves.save(step, state(step), {**state(step + 0.5), "lr": 0.1}, {"step": step})
    saves.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "step", "events", "moments"),
    [(1, 6, EVENTS, 15), (2, 5, RENAMING_EVENTS, 5)],
    ids=["one rank", "two ranks in the background, over a step saved before"],
)
def test_a_kill_at_any_moment_of_a_save_leaves_a_loadable_checkpoint(
    tmp_path: Path, ranks: int, step: int, events: set[str], moments: int
) -> None:
    outcomes = []
    for at in range(1, 60):
        folder = tmp_path / str(at)
        run_ranks(1, save_steps, folder, [4, 5])
        arguments = (folder, step, events, at)
        died = failing(lambda given=arguments: run_ranks(ranks, save_and_die, *given)) != ""  # type: ignore[misc]
        newest = run_ranks(1, load_newest, folder)[0]["step"]
        outcomes.append((died, newest))
        assert not list(folder.glob("*.tmp")), "leftovers are removed by the next run"
        if not died:
            break
    deaths, steps = zip(*outcomes, strict=True)
    assert len(deaths) > moments and not deaths[-1] and all(deaths[:-1])
    assert set(steps) == {5, step} and list(steps) == sorted(steps)
