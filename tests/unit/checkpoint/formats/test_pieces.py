"""Tensors that are read and written piece by piece instead of whole."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_qwenvl
from megatron_qwenvl.checkpoint.storage.manifest import MODEL_FOLDER
from megatron_qwenvl.checkpoint.storage.safetensors_files import write_safetensors
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.engine.checkpoint_index import INDEX_NAME, read_index
from megatron_qwenvl.engine.checkpoint_tensors import DistributedFolder

from ..hf_cases import TINY, random_weights, write_hf

TABLE = torch.arange(24.0).reshape(6, 4)
SPECS = {"table": TensorSpec((6, 4), torch.float32), "scale": TensorSpec((), torch.float32)}
SCALE = ("scale", torch.tensor(2.0))


def test_pieces_become_one_tensor(tmp_path: Path) -> None:
    pieces = [("table", piece) for piece in TABLE.split([1, 3, 2])]
    write_safetensors(tmp_path / "file.safetensors", SPECS, [*pieces, SCALE])
    found = load_file(tmp_path / "file.safetensors")
    assert torch.equal(found["table"], TABLE)
    assert torch.equal(found["scale"], SCALE[1])


@pytest.mark.parametrize(
    "tensors",
    [
        [("table", TABLE[:5]), SCALE],
        [("table", TABLE), ("table", TABLE[:1]), SCALE],
        [("table", TABLE[:, :2].repeat(2, 1)), SCALE],
        [("table", TABLE.to(torch.int32)), SCALE],
        [("other", TABLE), SCALE],
        [("table", TABLE)],
        [("table", TABLE), SCALE, SCALE[:1] + (TABLE,)],
    ],
    ids=["rows missing", "rows too many", "narrow", "type", "name", "tensor missing", "tensor too many"],
)
def test_what_was_not_announced_is_refused(tmp_path: Path, tensors: list[tuple[str, Tensor]]) -> None:
    with pytest.raises(ValueError):
        write_safetensors(tmp_path / "file.safetensors", SPECS, tensors)


def test_rows_come_in_their_order(tmp_path: Path) -> None:
    """Whatever the order of the index; and a tensor that is cut along another axis comes whole."""
    hf = write_hf(tmp_path / "hf", TINY, random_weights(TINY, torch.float32), True)
    execute_import(plan_qwenvl(hf), tmp_path / "megatron")
    path = tmp_path / "megatron" / MODEL_FOLDER
    index = read_index(path)
    for entry in index.state_dict_metadata.values():
        entry.chunks.reverse()
    (path / INDEX_NAME).write_bytes(pickle.dumps(index))
    folder = DistributedFolder(path)
    counts = {}
    for name in folder.specs:
        rows = list(folder.rows(name))
        counts[name] = len(rows)
        assert torch.equal(torch.cat(rows) if len(rows) > 1 else rows[0], folder.read(name)), name
    assert counts["embedding.word_embeddings.weight"] == 8
    assert counts["decoder.layers.0.mlp.linear_fc2.weight"] == 1
