"""Code in place of a tensor's values, in a file whose digest is right: refused by every reader, and it does not run."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_qwenvl.checkpoint.convert.compare import open_weights
from megatron_qwenvl.checkpoint.convert.exports import execute_export, plan_export
from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_qwenvl
from megatron_qwenvl.checkpoint.run.weights import load_weights
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import Manifest, read_manifest, write_manifest
from megatron_qwenvl.checkpoint.storage.writing import write_bytes
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.engine.checkpoint_index import read_index
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.model.build import build_stage
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks
from tests.distributed.model_cases import small_config

from ..cases import failing
from ..hf_cases import TINY, random_weights, write_hf

VICTIM = "decoder.final_layernorm.weight"


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._directory),)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Appears when the payload runs."""
    return tmp_path / "ran"


@pytest.fixture
def checkpoint(tmp_path: Path, ran: Path) -> Path:
    """Good weights, but for one item that holds code; the manifest agrees with every file."""
    execute_import(plan_qwenvl(write_hf(tmp_path / "hf", TINY, random_weights(TINY))), tmp_path / "megatron")
    folder = tmp_path / "megatron/model"
    stream = io.BytesIO()
    torch.save(Payload(ran), stream)
    torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    assert ran.exists(), "the payload works"
    ran.rmdir()
    index = read_index(folder)
    (where,) = [where for where in index.storage_data if where.fqn == VICTIM]
    name = index.storage_data[where].relative_path
    content = (folder / name).read_bytes()
    index.storage_data[where] = _StorageInfo(name, len(content), len(stream.getvalue()))
    manifest = read_manifest(tmp_path / "megatron")
    records = {
        f"model/{name}": write_bytes(folder / name, content + stream.getvalue()),
        "model/.metadata": write_bytes(folder / ".metadata", pickle.dumps(index)),
    }
    forged = manifest.model_dump() | {"files": {**manifest.files, **records}}
    write_manifest(tmp_path / "megatron", Manifest.model_validate(forged))
    return tmp_path / "megatron"


def test_the_streaming_reader_refuses_it(checkpoint: Path, ran: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.distcp: refused"):
        open_weights(checkpoint).read(VICTIM)
    assert not ran.exists()


def test_an_export_refuses_it(checkpoint: Path, ran: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.distcp: refused"):
        execute_export(plan_export(checkpoint), tmp_path / "out")
    assert not ran.exists() and not list(tmp_path.glob("out*"))


def load(process: ProcessInfo, weights: Path, config: RunConfig) -> str:
    runtime = start_engine(config, process)
    stage = build_stage(config, runtime, make_partition(config, 1))
    return failing(lambda: load_weights(weights, config, stage))


def test_a_run_refuses_it(checkpoint: Path, ran: Path) -> None:
    config = small_config().model_copy(update={"model": TINY})
    (message,) = run_ranks(1, load, checkpoint, config)
    assert "weights_only" in message or "refused" in message.lower(), message
    assert not ran.exists()
