"""A file system that stumbles costs time, not the run: data, index, tokenizer and checkpoints are read again."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.runtime import retry
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks
from tests.faulty_files import FaultyFiles
from tests.unit.data.conftest import QWEN_VOCABULARY

from .training_cases import records, run_config, train, write_data


def train_on_faulty_files(process: ProcessInfo, config: Any, folder: Path, *faults: Any) -> Any:
    """Train while files below `folder` are refused; calls refused by name, or the error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "FIRST_SECONDS", 0.001)
        faulty = FaultyFiles(patch, folder, *faults)
        try:
            train(process, config)
        except (CheckpointError, DataError) as error:
            return f"{type(error).__name__}: {error}"
        return faulty.refused


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_data_is_read_again_and_the_run_says_so(error: int, tmp_path: Path) -> None:
    source = write_data(tmp_path)
    undisturbed = run_config(tmp_path, tmp_path / "calm", "--train.steps", "3")
    run_ranks(1, train, undisturbed)
    config = run_config(tmp_path, tmp_path / "run", "--train.steps", "3")
    (refused,) = run_ranks(1, train_on_faulty_files, config, source, error, 2)
    for name in ("manifest.json", "000000.index.npz", "000000.tar"):
        assert refused[name] >= 2, name
    losses = [[record["loss"] for record in records(tmp_path / name)] for name in ("calm", "run")]
    assert losses[0] == losses[1]
    assert sum(record["repeated_reads"] for record in records(tmp_path / "run")) >= 3
    assert not any(record["repeated_reads"] for record in records(tmp_path / "calm"))


def read_checkpoint_of_faulty_files(process: ProcessInfo, config: Any, folder: Path) -> Any:
    """On rank 1 alone files are refused, as where one node's network stumbles."""
    return train_on_faulty_files(
        process, config, folder if process.rank == 1 else folder / "none", errno.EIO, 2
    )


def test_a_checkpoint_is_read_again_on_the_rank_that_could_not(tmp_path: Path) -> None:
    """Manifest, index, common part and tensors, also those that the engine opens itself; the others wait."""
    write_data(tmp_path)
    run = tmp_path / "run"
    run_ranks(2, train, run_config(tmp_path, run, "--train.steps", "3", world=2))
    config = run_config(tmp_path, run, "--train.steps", "4", world=2)
    refused = run_ranks(2, read_checkpoint_of_faulty_files, config, run / "checkpoints")
    assert not refused[0]
    for name in ("manifest.json", ".metadata", "common.pt", "metadata.json"):
        assert refused[1][name] >= 2, name
    assert sum(count for name, count in refused[1].items() if name.endswith(".distcp")) >= 2
    assert [record["step"] for record in records(run)] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["checkpoints", "latest", "environment"])
def test_the_run_directory_is_looked_at_again(name: str, tmp_path: Path) -> None:
    """Which checkpoints there are, which one is named, and what a start before has left."""
    write_data(tmp_path)
    run = tmp_path / "run"
    run_ranks(1, train, run_config(tmp_path, run, "--train.steps", "3"))
    config = run_config(tmp_path, run, "--train.steps", "4")
    (refused,) = run_ranks(1, train_on_faulty_files, config, run, errno.ESTALE, 2, name)
    assert isinstance(refused, dict) and refused[name] >= 2, refused
    assert [record["step"] for record in records(run)] == [0, 1, 2, 3]


def test_weights_to_start_from_are_read_again(tmp_path: Path) -> None:
    write_data(tmp_path)
    run_ranks(1, train, run_config(tmp_path, tmp_path / "one", "--train.steps", "3", recipe="tiny_stage1"))
    overrides = ("--train.steps", "3", "--checkpoint.init_from", str(tmp_path / "one"))
    config = run_config(tmp_path, tmp_path / "two", *overrides)
    (refused,) = run_ranks(1, train_on_faulty_files, config, tmp_path / "one", errno.ETIMEDOUT, 1)
    assert refused["manifest.json"] and refused[".metadata"] and refused["latest"], refused


def test_the_vocabulary_is_read_again(tmp_path: Path) -> None:
    write_data(tmp_path)
    config = run_config(tmp_path, tmp_path / "run", "--data.tokenizer", QWEN_VOCABULARY)
    folder = Path(QWEN_VOCABULARY).parent
    (found,) = run_ranks(1, train_on_faulty_files, config, folder, errno.EIO, 2)
    assert found.startswith("DataError") and "indexed with another tokenizer" in found  # it was read


def test_an_error_that_stays_ends_the_run_by_name(tmp_path: Path) -> None:
    source = write_data(tmp_path)
    config = run_config(tmp_path, tmp_path / "run", "--runtime.retry_minutes", "0.005")
    (found,) = run_ranks(1, train_on_faulty_files, config, source, errno.EIO, 10**9, ".tar")
    assert found.startswith("DataError") and ".tar" in found and "Input/output error" in found
