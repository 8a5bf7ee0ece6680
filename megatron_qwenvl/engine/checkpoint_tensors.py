"""Full tensors of a distributed checkpoint, one by one: no process group, no model, bounded memory.

Relies on torch's index of a distributed checkpoint: which chunks a tensor has (`TensorStorageMetadata`), under which
key a chunk's place is kept (`MetadataIndex` of name and offsets), and that a place has `relative_path`, `offset` and
`length`. Held by `tests/unit/engine/test_checkpoint_files.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.non_finite import NonFinite, find_non_finite
from megatron_qwenvl.checkpoint.storage.tensors import Region, TensorSpec
from megatron_qwenvl.checkpoint.storage.writing import DigestWriter, FileRecord

from .checkpoint_index import INDEX_NAME, read_index
from .checkpoint_items import StoredItem, StoredPlace, read_item, with_own_storage, write_index, write_item

ChunkGrid = tuple[int, int]
"""The axis along which a tensor is stored in chunks of equal size, and their number."""


class DistributedFolder:
    """The tensors of one distributed-checkpoint folder, written at any layout.

    Raises:
        CheckpointError: the index is missing, damaged or not plain data.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = read_index(folder)
        self._tensors = {
            name: entry
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._places = index.storage_data

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Full shapes and types."""
        return {
            name: TensorSpec(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._tensors.items()
        }

    def files_missing(self) -> list[str]:
        """Names of files that the index refers to and that are not there."""
        files = {place.relative_path for place in self._places.values()}
        return sorted(name for name in files if not (self._folder / name).is_file())

    def files_of(self, name: str) -> set[str]:
        """Names of the files that hold a tensor."""
        places = (self._place(name, chunk) for chunk in self._tensors[name].chunks)
        return {place.relative_path for place in places if place is not None}

    def non_finite(self, file: str) -> list[NonFinite]:
        """Find the values of a file that are not finite, chunk by chunk; one entry for a chunk.

        Raises:
            CheckpointError: as `read`.
        """
        found = []
        for name, entry in self._tensors.items():
            for chunk in entry.chunks:
                place = self._place(name, chunk)
                if place is not None and place.relative_path == file:
                    found.append(find_non_finite(name, self._read_chunk(name, chunk), tuple(chunk.offsets)))
        return [bad for bad in found if bad]

    def uncovered(self) -> list[str]:
        """Names of tensors whose stored chunks do not add up to the full tensor: some lie nowhere, over one another or
        outside, or a part is missing."""
        return [name for name, entry in self._tensors.items() if not self._covered(name, entry)]

    def _covered(self, name: str, entry: TensorStorageMetadata) -> bool:
        elements = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        return (
            elements == math.prod(entry.size)
            and all(self._place(name, chunk) is not None for chunk in entry.chunks)
            and all(_is_inside(chunk, entry.size) for chunk in entry.chunks)
            and not any(_overlap(a, b) for a, b in combinations(entry.chunks, 2))
        )

    def _place(self, name: str, chunk: ChunkStorageMetadata) -> StoredPlace | None:
        place: StoredPlace | None = self._places.get(MetadataIndex(name, chunk.offsets))
        return place

    def read(self, name: str) -> Tensor:
        """Read a full tensor from its chunks.

        Raises:
            CheckpointError: not in the checkpoint, unreadable, or its chunks do not fit.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self._folder}: no tensor {name}")
        entry = self._tensors[name]
        if len(entry.chunks) == 1:
            return self._read_chunk(name, entry.chunks[0])
        full = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for region, piece in self.pieces(name):
            full[region].copy_(piece)
        return full

    def pieces(self, name: str) -> Iterator[tuple[Region, Tensor]]:
        """Read a tensor chunk by chunk, each with its place in the full tensor.

        Raises:
            CheckpointError: as `read`.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self._folder}: no tensor {name}")
        for chunk in self._tensors[name].chunks:
            region = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            yield region, self._read_chunk(name, chunk)

    def rows(self, name: str) -> Iterator[Tensor]:
        """Read a tensor from its first row to its last, in the pieces in which it is stored; as one where these are
        not whole rows.

        Raises:
            CheckpointError: as `read`.
        """
        stored = self._tensors.get(name)
        if stored is None or any(chunk.sizes[1:] != stored.size[1:] for chunk in stored.chunks):
            yield self.read(name)
            return
        for chunk in sorted(stored.chunks, key=lambda chunk: tuple(chunk.offsets)):
            yield self._read_chunk(name, chunk)

    def _read_chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._place(name, chunk)
        if place is None:
            raise CheckpointError(
                f"{self._folder / INDEX_NAME}: {name}: no place for offset {list(chunk.offsets)}"
            )
        tensor = read_item(self._folder, place)
        if tensor.shape != chunk.sizes:
            path = self._folder / place.relative_path
            raise CheckpointError(f"{path}: {name}: expected {list(chunk.sizes)}, found {list(tensor.shape)}")
        return tensor


def _is_inside(chunk: ChunkStorageMetadata, full: torch.Size) -> bool:
    return len(chunk.offsets) == len(full) and all(
        0 <= offset <= offset + size <= length
        for offset, size, length in zip(chunk.offsets, chunk.sizes, full, strict=True)
    )


def _overlap(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
    return all(
        max(first, second) < min(first + first_size, second + second_size)
        for first, first_size, second, second_size in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )


def write_chunks(
    file: DigestWriter, file_name: str, name: str, tensor: Tensor, grid: ChunkGrid
) -> list[StoredItem]:
    """Append a full tensor to an open file, chunk by chunk.

    Args:
        file: the open file.
        file_name: its name relative to the folder.
        name: the tensor's name.
        tensor: all of it, on the CPU.
        grid: its chunks.

    Raises:
        OSError: the file system refused.
    """
    stored: list[StoredItem] = []
    axis, count = grid
    size = tensor.shape[axis] // count if tensor.dim() else 1
    for number in range(count):
        chunk = tensor.narrow(axis, number * size, size).contiguous() if count > 1 else tensor
        offset = [number * size if a == axis else 0 for a in range(tensor.dim())]
        stored.append(write_item(file, file_name, MetadataIndex(name, offset), with_own_storage(chunk)))
    return stored


def write_tensor_index(
    folder: Path, tensors: Mapping[str, tuple[TensorSpec, ChunkGrid]], items: Iterable[StoredItem]
) -> FileRecord:
    """Write the index of a folder that was written by `write_chunks`."""
    entries: dict[str, STORAGE_TYPES] = {
        name: _index_entry(spec, *grid) for name, (spec, grid) in tensors.items()
    }
    return write_index(folder, Metadata(state_dict_metadata=entries), items)


def _index_entry(spec: TensorSpec, axis: int, count: int) -> TensorStorageMetadata:
    sizes = list(spec.shape)
    if count > 1:
        sizes[axis] //= count
    chunks = [
        ChunkStorageMetadata(
            torch.Size([number * sizes[axis] if a == axis else 0 for a in range(len(sizes))]),
            torch.Size(sizes),
        )
        for number in range(count)
    ]
    return TensorStorageMetadata(TensorProperties(dtype=spec.dtype), torch.Size(spec.shape), chunks)
