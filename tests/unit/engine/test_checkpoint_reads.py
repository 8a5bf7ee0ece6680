"""The engine's own reads of a checkpoint outlast a file system that is away for a while."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_qwenvl.checkpoint.run.ranks import Ranks
from megatron_qwenvl.checkpoint.run.sharded_folder import FolderSave, load_folder
from megatron_qwenvl.engine.checkpoint_reads import patient_engine_reads
from megatron_qwenvl.engine.checkpoint_state import load_common, load_state
from megatron_qwenvl.runtime import retry
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks
from tests.faulty_files import FaultyFiles
from tests.unit.checkpoint.cases import failing, join, state, weights


def save(process: ProcessInfo, folder: Path) -> Ranks:
    """Save one folder and go on as its ranks."""
    join(process)
    ranks = Ranks(1)
    save = FolderSave({**state(3), "lr": 0.5}, folder, snapshot=False, ranks=ranks)
    save.write()
    save.finish()
    ranks.barrier()
    return ranks


def load_while_away(process: ProcessInfo, folder: Path) -> Counter[str]:
    """Load while every call on a file or directory below the folder's parent fails twice; what was refused."""
    save(process, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "FIRST_SECONDS", 0.001)
        faulty = FaultyFiles(patch, folder.parent, errno.EIO, 2)
        assert load_common(folder) == {"lr": 0.5}
        loaded = load_state(state(0), folder)
    assert torch.equal(loaded["matrix"], weights(3))
    return faulty.refused


def test_every_read_of_the_engine_is_patient(tmp_path: Path) -> None:
    folder = tmp_path / "run/model"
    folder.mkdir(parents=True)
    (refused,) = run_ranks(1, load_while_away, folder)
    for name in ("model", "metadata.json", "common.pt", ".metadata", "__0_0.distcp"):
        assert refused[name] >= 2, f"{name} is read without patience: refused were {dict(refused)}"


def test_nothing_stays_replaced() -> None:
    from megatron.core.dist_checkpointing import core, serialization, validation
    from torch.distributed.checkpoint import filesystem

    places = (core, serialization, validation, torch.serialization, filesystem.FileSystem)
    before = [dict(vars(place)) for place in places]
    with patient_engine_reads():
        assert [dict(vars(place)) for place in places] != before
    assert [dict(vars(place)) for place in places] == before


def load_with_one_rank_blind(process: ProcessInfo, folder: Path) -> str:
    """On rank 1 alone no tensor can be read, ever."""
    ranks = save(process, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry.retry_read, "seconds", 0.1)
        if process.rank == 1:
            FaultyFiles(patch, folder, errno.EIO, 10**9, ".distcp")
        return failing(lambda: load_folder(state(0, axis=1), folder, ranks))


def test_a_rank_that_cannot_read_ends_the_load_on_every_rank(tmp_path: Path) -> None:
    errors = run_ranks(2, load_with_one_rank_blind, tmp_path, timeout=60)
    assert errors[0].startswith("CheckpointError: cannot be loaded"), errors
    assert "rank 1" in errors[0] and "Input/output error" in errors[0] and errors[1] == errors[0]
