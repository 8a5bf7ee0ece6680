"""Checkpoints moved away by a rewind, and how a job that Slurm starts again knows that it did so."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_qwenvl.checkpoint.run.rewind import RECORD, is_rewound, move_newer_checkpoints, of_step
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.run_folder import checkpoints_of_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of the steps 2, 4 and 6, as far as names go."""
    for step in (2, 4, 6):
        (tmp_path / f"step_{step:08d}").mkdir()
    return tmp_path


def slurm(monkeypatch: pytest.MonkeyPatch, job: str | None, restarts: str | None) -> None:
    for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restarts)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def test_newer_checkpoints_are_moved_and_counted(folder: Path) -> None:
    rewind = move_newer_checkpoints(folder, 2)
    assert (rewind.from_step, rewind.to_step, rewind.moved) == (6, 2, 2)
    assert [path.name for path in checkpoints_of_run(folder)] == ["step_00000002"]
    assert sorted(path.name for path in Path(rewind.folder).iterdir()) == [
        RECORD, "step_00000004", "step_00000006"
    ]  # fmt: skip
    again = move_newer_checkpoints(folder, 2)
    assert (again.from_step, again.moved) == (2, 0) and again.folder != rewind.folder


def test_a_step_without_a_checkpoint_is_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert of_step(checkpoints_of_run(folder), 4).name == "step_00000004"
    with pytest.raises(CheckpointError, match="--from_step 5: expected the step of .* found 2, 4, 6"):
        of_step(checkpoints_of_run(folder), 5)
    with pytest.raises(CheckpointError, match="found no checkpoint"):
        of_step([], 5)


def test_only_the_same_job_started_again_has_gone_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, "77", None)
    assert not is_rewound(folder, 4)
    move_newer_checkpoints(folder, 4)
    assert not is_rewound(folder, 4)  # the same job by hand, or a first start that was cut short
    slurm(monkeypatch, "77", "1")
    assert is_rewound(folder, 4) and not is_rewound(folder, 2)
    slurm(monkeypatch, "78", "1")
    assert not is_rewound(folder, 4)
    slurm(monkeypatch, None, None)
    assert not is_rewound(folder, 4)


def test_a_torn_record_is_none_and_an_unreadable_one_stops(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Path(move_newer_checkpoints(folder, 4).folder) / RECORD
    slurm(monkeypatch, "77", "1")
    record.write_text('{"to_st')
    assert not is_rewound(folder, 4)
    record.unlink()
    record.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        is_rewound(folder, 4)
