"""Contract: index, items and tensors of a distributed checkpoint are those that torch itself writes and reads."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.checkpoint.storage.writing import open_durable
from megatron_qwenvl.engine.checkpoint_index import INDEX_NAME, MARK_NAME, read_index, write_common
from megatron_qwenvl.engine.checkpoint_items import StoredPlace
from megatron_qwenvl.engine.checkpoint_tensors import DistributedFolder, write_chunks, write_tensor_index

TENSORS = {
    "matrix": torch.arange(24.0).reshape(6, 4),
    "vector": torch.arange(5, dtype=torch.int64),
    "half": torch.ones(2, 2, dtype=torch.bfloat16),
}
GRIDS = {"matrix": (0, 3), "vector": (0, 1), "half": (1, 2)}


def save_by_torch(folder: Path, state: dict[str, Any]) -> None:
    """Save with torch's own writer, whose index also holds the folder's path, an object that is not admitted."""
    dcp.save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    path = folder / INDEX_NAME
    index = pickle.loads(path.read_bytes())
    index.storage_meta = StorageMeta()
    path.write_bytes(pickle.dumps(index))


def test_a_folder_that_torch_wrote_is_read(tmp_path: Path) -> None:
    save_by_torch(tmp_path, dict(TENSORS))
    folder = DistributedFolder(tmp_path)
    assert folder.specs == {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
    assert folder.uncovered() == [] == folder.files_missing()
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in TENSORS.items())


def write_folder(folder: Path) -> None:
    """Write the tensors, each in the chunks of its grid."""
    items = []
    with open_durable(folder / "__0_0.distcp") as file:
        for name, tensor in TENSORS.items():
            items += write_chunks(file, "__0_0.distcp", name, tensor, GRIDS[name])
        file.sync()
    specs = {name: (TensorSpec(tuple(t.shape), t.dtype), GRIDS[name]) for name, t in TENSORS.items()}
    write_tensor_index(folder, specs, items)


def test_torch_reads_a_folder_that_was_written_here(tmp_path: Path) -> None:
    write_folder(tmp_path)
    loaded = {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(loaded, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_a_place_has_a_path_an_offset_and_a_length(tmp_path: Path) -> None:
    write_folder(tmp_path)
    places = read_index(tmp_path).storage_data.values()
    assert len(places) == 6
    for place in places:
        assert isinstance(place, StoredPlace)
        end = (tmp_path / place.relative_path).stat().st_size
        assert 0 <= place.offset < place.offset + place.length <= end
    assert StoredPlace("a", 1, 2).relative_path == "a"


def test_the_index_of_torch_is_made_of_the_classes_that_are_admitted(tmp_path: Path) -> None:
    """What torch pickles passes; anything else does not."""
    save_by_torch(tmp_path, {"matrix": TENSORS["matrix"], "number": 7})
    assert set(read_index(tmp_path).state_dict_metadata) == {"matrix", "number"}
    (tmp_path / INDEX_NAME).write_bytes(pickle.dumps(Path(".")))
    with pytest.raises(CheckpointError, match="refused: it asks for pathlib"):
        read_index(tmp_path)


def test_the_mark_of_the_format_is_understood_by_megatron_core(tmp_path: Path) -> None:
    from megatron.core.dist_checkpointing.core import CONFIG_FNAME, maybe_load_config
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

    records = write_common(tmp_path, {"lr": 0.5})
    assert records.keys() == {COMMON_STATE_FNAME, CONFIG_FNAME}
    assert MARK_NAME == CONFIG_FNAME
    found = maybe_load_config(str(tmp_path))
    assert found is not None and (found.sharded_backend, found.sharded_backend_version) == ("torch_dist", 1)
