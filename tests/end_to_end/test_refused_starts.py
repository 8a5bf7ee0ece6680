"""A start that is refused changes nothing in the run directory, and says why in one line."""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.commands import run_progress
from megatron_qwenvl.config.load import load_config
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks

from .training_cases import run_config, train, write_data


def tree(folder: Path) -> dict[str, Any]:
    """Everything below a directory: names, modification times and contents."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in [folder, *sorted(folder.rglob("*"))]
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data folder and the directory of a finished run on it, with what a crash may leave."""
    data = tmp_path_factory.mktemp("data")
    write_data(data)
    run = data / "finished"
    run_ranks(1, train, run_config(data, run, "--train.steps", "2", "--optimizer.warmup_steps", "1"))
    (run / "checkpoints/step_00000009.tmp").mkdir()
    (run / "checkpoints/latest").write_text("step_00000001\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    return data, run


def refused(process: ProcessInfo, config: Any) -> str:
    """The reason for which a start is refused."""
    try:
        train(process, config)
    except (CheckpointError, DataError) as error:
        return str(error)
    return "not refused"


def logged(process: ProcessInfo, config: Any) -> str:
    """What a run logs."""
    log = io.StringIO()
    logging.getLogger("megatron_qwenvl").addHandler(logging.StreamHandler(log))
    train(process, config)
    return log.getvalue()


def progress_line(run: Path) -> str:
    """What `tools/run_progress.py` says of a run."""
    return run_progress.describe_run(run)


def truncate_weights(run: Path) -> None:
    for file in run.glob("checkpoints/step_*/model/*.distcp"):
        os.truncate(file, 100)


def instead_of(file: Path) -> None:
    file.unlink()
    file.mkdir()


REFUSALS: dict[str, tuple[list[str], Callable[[Path], object], str]] = {
    "another stage": (["tiny_stage1"], str, "expected training of stage1, found training of stage2"),
    "another model": (["--model.decoder.layers", "3"], str, "decoder.layers: expected 3, found 2"),
    "no data": (["--data.sources", "[{name: mixed, path: gone}]"], str, "gone: no such directory of shards"),
    "no tokenizer": (["--data.tokenizer", "gone.tiktoken"], str, "gone.tiktoken: cannot read the vocabulary"),
    "no validation data": (
        ["--data.validation_sources", "[{name: v, path: none}]", "--train.validation_interval", "1"],
        str,
        "none: no such directory of shards",
    ),
    "a directory for config.yaml": (
        [],
        lambda run: instead_of(run / "config.yaml"),
        "config.yaml: expected the file that holds the configuration, found a directory",
    ),
    "a directory for config.json": (
        [],
        lambda run: instead_of(run / "config.json"),
        "config.json: expected the file that holds the configuration, found a directory",
    ),
    "damaged checkpoints": ([], truncate_weights, "checkpoints are damaged"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_start_changes_nothing(name: str, finished: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = finished
    overrides, prepare, reason = REFUSALS[name]
    recipe = overrides.pop(0) if overrides and not overrides[0].startswith("--") else "tiny_stage2"
    copy = shutil.copytree(run, tmp_path / "run")
    prepare(copy)
    before = tree(copy)
    ranks = 2 if name == "another model" else 1
    config = run_config(data, copy, "--train.steps", "4", *overrides, recipe=recipe, world=ranks)
    assert all(reason in found for found in run_ranks(ranks, refused, config))
    assert tree(copy) == before


def test_a_run_directory_that_cannot_be_one_is_refused_before_anything_is_loaded(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    data, _ = finished
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    long = tmp_path / ("x" * 300)
    for place, reason in {
        tmp_path / "file": "file is not one",
        tmp_path / "file/below/it": "file is not one",
        tmp_path / "dangling": "dangling is not one",
        long: "File name too long",
    }.items():
        (found,) = run_ranks(1, refused, run_config(data, place))
        assert reason in found and "\n" not in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "config.yaml is empty"),
        (b"name: tiny\ndata:\n  sources: [{na", "config.yaml is damaged"),
        (b"\xff\x00\xfe", "config.yaml is damaged"),
        (b"just text", "config.yaml is damaged (just text)"),
        (None, "config.yaml is missing"),
    ],
)
def test_a_damaged_configuration_file_is_told_and_written_anew(
    content: bytes | None, told: str, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    data, run = finished
    copy = shutil.copytree(run, tmp_path / "run")
    for name in ("config.yaml", "config.json"):
        assert progress_line(copy).startswith("step 2/2")  # one of the two will do
        if content is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(content)
    assert "step 2/?" in progress_line(copy) and "config.json and config.yaml are missing" in progress_line(
        copy
    )
    config = run_config(data, copy, "--train.steps", "3")
    (log,) = run_ranks(1, logged, config)
    assert told in log
    assert load_config(str(copy / "config.yaml")) == config
    assert progress_line(copy).startswith("step 3/3")


def test_paths_that_cannot_be_are_refused_in_one_line(finished: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = finished
    long = str(tmp_path / ("x" * 300))
    for overrides in (
        ("--data.root", long),
        ("--data.tokenizer", long),
        ("--checkpoint.init_from", long),
    ):
        (found,) = run_ranks(1, refused, run_config(data, tmp_path / "run", *overrides))
        assert "File name too long" in found and "\n" not in found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"\0\0\0\0", b"step_99999999", b"../../x"])
def test_a_damaged_pointer_is_written_anew(
    content: bytes, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    data, run = finished
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints/latest").write_bytes(content)
    run_ranks(1, logged, run_config(data, copy, "--train.steps", "3"))
    assert (copy / "checkpoints/latest").read_text() == "step_00000003\n"
