"""Writing of distributed checkpoints without process groups, without the model and with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.checkpoint.storage.writing import FileRecord, open_durable, sync_directory
from megatron_qwenvl.engine.checkpoint_index import INDEX_NAME, write_common
from megatron_qwenvl.engine.checkpoint_items import StoredItem
from megatron_qwenvl.engine.checkpoint_tensors import write_chunks, write_tensor_index

from .chunk_grid import chunk_grid


class FolderFile:
    """One `.distcp` file of a folder under construction; files can be written by different processes."""

    def __init__(self, folder: Path, number: int) -> None:
        self.name = f"__0_{number}.distcp"
        self._path = folder / self.name

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> tuple[list[StoredItem], FileRecord]:
        """Write full tensors, each in the chunks of `chunk_grid`, durably."""
        stored: list[StoredItem] = []
        with open_durable(self._path) as file:
            for name, tensor in tensors:
                stored += write_chunks(file, self.name, name, tensor, chunk_grid(name, tuple(tensor.shape)))
            return stored, file.sync()


def finish_folder(
    folder: Path, specs: Mapping[str, TensorSpec], items: Iterable[StoredItem]
) -> dict[str, FileRecord]:
    """Complete a folder that megatron-core loads: write the index, an empty common state and the mark of the format."""
    tensors = {name: (spec, chunk_grid(name, spec.shape)) for name, spec in specs.items()}
    records = {**write_common(folder, {}), INDEX_NAME: write_tensor_index(folder, tensors, items)}
    sync_directory(folder)
    return records
