"""Steps without a supervised token, unreadable samples that are too many, and saves before the first update."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.loading.loader import build_loader
from megatron_qwenvl.data.shards.index import load_index
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.errors import TrainingError
from tests.distributed.harness import run_ranks

from .training_cases import records, run_config, train, write_data

LAYOUTS = {
    "whole": (1, ["--optimizer.sharded", "false"]),
    "sharded": (1, ["--optimizer.sharded", "true"]),
    "whole bf16": (1, ["--optimizer.sharded", "false", "--train.precision", "bf16"]),
    "sharded bf16": (1, ["--optimizer.sharded", "true", "--train.precision", "bf16"]),
    "data 2, sharded": (2, ["--optimizer.sharded", "true"]),
    "pipeline 2, whole": (2, ["--optimizer.sharded", "false", "--parallel.pipeline", "2"]),
    "tensor 2, sharded, in the background": (
        2,
        ["--optimizer.sharded", "true", "--parallel.tensor", "2", "--checkpoint.asynchronous", "true"],
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_data(folder)
    return folder


def spoil_samples(config: RunConfig, names: list[str]) -> None:
    """Overwrite the records of samples; the shards keep size and time."""
    for name in names:
        shard, _, key = name.rpartition(":")
        path, before = Path(shard), os.stat(shard)
        index = load_index(path)
        (row,) = [row for row in range(len(index)) if index.key(row) == key]
        _, member = index.text_member(row)
        with path.open("r+b") as file:
            file.seek(member.offset)
            file.write(bytes(member.size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def samples_of_step(config: RunConfig, step: int) -> list[str]:
    return next(iter(build_loader(config, first_step=step))).sample_names()


def with_spoilt_steps(sound: Path, folder: Path, *steps: int) -> Path:
    """A copy of the data in which no sample of these steps can be read."""
    data = folder / "data"
    shutil.copytree(sound, data)
    config = run_config(data, folder / "unused")
    for step in steps:
        spoil_samples(config, samples_of_step(config, step))
    return data


def outcome(process: ProcessInfo, config: RunConfig) -> Any:
    """As `train`; the type and text of an expected error instead."""
    try:
        return train(process, config)
    except (DataError, TrainingError) as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("layout", ["whole", "sharded", "pipeline 2, whole"])
def test_a_step_without_a_supervised_token_is_no_step(sound: Path, tmp_path: Path, layout: str) -> None:
    """Its number, data and place in the schedule are used up; weights, moments and the step count stay."""
    world, how = LAYOUTS[layout]
    data = with_spoilt_steps(sound, tmp_path, 2)
    until = {
        steps: run_ranks(
            world,
            train,
            run_config(data, tmp_path / f"{steps}", *how, "--train.stop_after", f"{steps}", world=world),
        )
        for steps in (2, 3)
    }
    for before, after in zip(until[2], until[3], strict=True):
        for kind in ("weights", "state"):
            assert flat(before[kind]) and all(map(torch.equal, flat(before[kind]), flat(after[kind])))
        assert after["progress"].step == 3 and after["progress"].updates == 2
        assert after["progress"].samples == 24 and after["progress"].unreadable_samples == 8
    last = records(tmp_path / "3")[-1]
    assert (last["loss"], last["loss_tokens"], last["applied"]) == (None, 0, False)
    assert last["not_applied_because"] == "no supervised token"
    good = run_config(sound, tmp_path / "good", *how, "--train.stop_after", "4", world=world)
    more = run_config(data, tmp_path / "3", *how, "--train.stop_after", "4", world=world)
    run_ranks(world, train, good)
    run_ranks(world, train, more)
    (mine,), (theirs,) = records(tmp_path / "3")[3:], records(tmp_path / "good")[3:]
    for same in ("step", "lr", "samples", "tokens", "loss_tokens"):
        assert mine[same] == theirs[same]


def flat(tensors: Any) -> list[torch.Tensor]:
    """All tensors of nested tuples, lists and dictionaries, in order."""
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    if isinstance(tensors, dict):
        tensors = list(tensors.values())
    return [tensor for part in tensors for tensor in flat(part)] if isinstance(tensors, list | tuple) else []


def test_steps_without_supervised_tokens_count_towards_the_limit(sound: Path, tmp_path: Path) -> None:
    data = with_spoilt_steps(sound, tmp_path, 1, 2, 3)
    config = run_config(data, tmp_path / "run", "--train.max_skipped_steps", "2")
    ((kind, said),) = run_ranks(1, outcome, config)
    assert kind == "TrainingError"
    assert "step 4: no supervised token: 8 of its 8 samples could not be read" in said
    assert "train.max_skipped_steps 2" in said and "000000.tar (" in said
    enough = run_config(data, tmp_path / "run", "--train.max_skipped_steps", "3", "--train.stop_after", "5")
    ((result),) = run_ranks(1, outcome, enough)
    assert result["progress"].step == 5 and result["progress"].skipped_in_a_row == 0


def test_a_run_without_a_step_that_was_applied_does_not_end_well(sound: Path, tmp_path: Path) -> None:
    data = with_spoilt_steps(sound, tmp_path, 0, 1)
    config = run_config(data, tmp_path / "run", "--train.steps", "2", "--optimizer.warmup_steps", "1")
    ((kind, said),) = run_ranks(1, outcome, config)
    assert kind == "TrainingError" and "without a step that was applied" in said


def test_a_validation_without_a_supervised_token_has_no_loss(
    sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Six samples, of which none can be read."""
    data = tmp_path / "data"
    shutil.copytree(sound, data)
    write_data(data, samples=6, name="held_out")
    validated = (
        "--data.validation_sources", "[{name: held_out, path: held_out}]", "--train.validation_interval", "1",
        "--train.validation_samples", "6", "--train.stop_after", "1",
    )  # fmt: skip
    config = run_config(data, tmp_path / "run", *validated)
    spoil_samples(config, [f"{data}/held_out/000000.tar:{number:05d}" for number in range(6)])
    run_ranks(1, train, config)
    (record,) = records(tmp_path / "run", "validation")
    assert record["loss"] is None


@pytest.mark.parametrize("layout", ["sharded", "data 2, sharded", "pipeline 2, whole"])
def test_too_many_unreadable_samples_stop_the_run(sound: Path, tmp_path: Path, layout: str) -> None:
    """Two of eight samples of every step in a window of four steps: 8 of 32. The window goes on over a new start, and
    the advice of the message helps."""
    world, how = LAYOUTS[layout]
    data = tmp_path / "data"
    shutil.copytree(sound, data)
    config = run_config(
        data, tmp_path / "run", *how, "--data.unreadable_window", "32", "--data.max_unreadable_share", "0.2",
        "--train.stop_after", "2", world=world,
    )  # fmt: skip
    for step in range(5):
        spoil_samples(config, samples_of_step(config, step)[:2])
    run_ranks(world, train, config)
    more = config.model_copy(update={"train": config.train.model_copy(update={"stop_after": 5})})
    (kind, said), *others = run_ranks(world, outcome, more)
    assert kind == "DataError" and all(other == (kind, said) for other in others)
    assert "step 4: 8 of the newest 32 samples could not be read" in said
    assert "data.max_unreadable_share 0.2 allows 6" in said and ".tar (" in said
    larger = config.data.model_copy(update={"max_unreadable_share": 0.25})
    results = run_ranks(world, outcome, more.model_copy(update={"data": larger}))
    assert results[0]["progress"].step == 5 and results[0]["progress"].unreadable_samples == 10


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("whole", "pipeline 2, whole"),
        ("pipeline 2, whole", "whole"),
        ("whole bf16", "whole bf16"),
        ("sharded bf16", "sharded bf16"),
        ("sharded", "tensor 2, sharded, in the background"),
        ("tensor 2, sharded, in the background", "data 2, sharded"),
    ],
)
def test_a_save_before_the_first_update(sound: Path, tmp_path: Path, first: str, then: str) -> None:
    """The first step has no supervised token; what is saved after it goes on in any layout."""
    data = with_spoilt_steps(sound, tmp_path, 0)

    def run(layout: str, folder: str, stop_after: int) -> Any:
        world, how = LAYOUTS[layout]
        config = run_config(data, tmp_path / folder, *how, "--train.stop_after", f"{stop_after}", world=world)
        return run_ranks(world, train, config)[0]

    assert run(first, "run", 1)["progress"].updates == 0
    assert dataclasses.astuple(run(then, "run", 3)["progress"])[:2] == (3, 24)
    run(then, "straight", 3)
    bf16 = "bf16" in then
    assert (
        compare(open_weights(tmp_path / "run"), open_weights(tmp_path / "straight"), 2e-2 if bf16 else 1e-5)
        == []
    )
