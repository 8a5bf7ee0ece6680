"""A checkpoint that carries code is refused before the code can run, although its digests are right."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedObject

from megatron_qwenvl.checkpoint.run.manager import CheckpointManager
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from megatron_qwenvl.checkpoint.storage.writing import write_bytes
from megatron_qwenvl.engine.checkpoint_index import read_index
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks

from ..cases import CONFIG, failing, join, load_newest, save_steps, state


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._file),)


def replace_file(checkpoint: Path, name: str, content: bytes) -> None:
    """Put other content into a checkpoint and make its manifest agree."""
    manifest = read_manifest(checkpoint)
    record = write_bytes(checkpoint / name, content)
    forged = manifest.model_copy(update={"files": {**manifest.files, name: record}})
    write_manifest(checkpoint, Manifest.model_validate(forged.model_dump()))


def torch_pickle(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["model/.metadata", "model/common.pt", "optimizer/common.pt"])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path, name: str) -> None:
    run_ranks(1, save_steps, tmp_path / "run", [5])
    ran = tmp_path / "ran"
    if name.endswith(".metadata"):
        content = pickle.dumps(Payload(ran))
        pickle.loads(content)
    else:
        content = torch_pickle({"x": Payload(ran)})
        torch.load(io.BytesIO(content), weights_only=False)
    assert ran.exists(), "the payload works"
    ran.rmdir()
    replace_file(tmp_path / "run/step_00000005", name, content)
    with pytest.raises(AssertionError, match=r"CheckpointError.*(refused|not a checkpoint index)"):
        run_ranks(1, load_newest, tmp_path / "run")
    assert not ran.exists()


def save_object(process: ProcessInfo, folder: Path, payload: Any) -> None:
    join(process)
    model = {**state(1), "object": ShardedObject("object", payload, (1,), (0,))}
    CheckpointManager(folder, CONFIG).save(1, model, state(1.5), {})


def load_object(process: ProcessInfo, folder: Path) -> str:
    join(process)
    manager = CheckpointManager(folder, CONFIG)
    newest = manager.latest()
    assert newest is not None
    model = {**state(0), "object": ShardedObject("object", None, (1,), (0,))}
    return failing(lambda: manager.load(newest, model, state(0)))


@pytest.mark.parametrize("hostile", [True, False])
def test_code_in_a_saved_object_is_refused(tmp_path: Path, hostile: bool) -> None:
    ran = tmp_path / "ran"
    run_ranks(1, save_object, tmp_path / "run", Payload(ran) if hostile else {"plain": 1})
    message = run_ranks(1, load_object, tmp_path / "run")[0]
    assert ("refused" in message) == hostile
    assert not ran.exists()


@pytest.mark.parametrize("attribute", ["__init__", "__class__"])
def test_an_index_cannot_reach_attributes_of_its_classes(tmp_path: Path, attribute: str) -> None:
    """`getattr` is how an enumeration's member may be pickled; it must not open any other door."""

    class Reach:
        def __reduce__(self) -> Any:
            from torch.distributed.checkpoint.metadata import Metadata

            return getattr, (Metadata, attribute)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Reach()))
    with pytest.raises(CheckpointError, match=r"builtins\.getattr"):
        read_index(tmp_path)


def test_an_edited_manifest_is_noticed(tmp_path: Path) -> None:
    run_ranks(1, save_steps, tmp_path, [5])
    path = tmp_path / "step_00000005" / MANIFEST_NAME
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "step": 6}))
    with pytest.raises(CheckpointError, match="does not match its digest"):
        read_manifest(path.parent)
