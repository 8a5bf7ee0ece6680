"""Distributed checkpoints tensor by tensor: without process group, without the model, with bounded memory."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_qwenvl.checkpoint.storage.files import (
    CheckpointError,
    FileRecord,
    sync_directory,
    write_bytes,
    writing,
)
from megatron_qwenvl.checkpoint.storage.finite import NonFinite, find_non_finite
from megatron_qwenvl.checkpoint.storage.tensors import Region, TensorSpec
from megatron_qwenvl.engine.checkpoint_index import COMMON_NAME, INDEX_NAME, read_index
from megatron_qwenvl.engine.checkpoint_items import (
    StoredItem,
    read_item,
    with_own_storage,
    write_index,
    write_item,
)

from .names import chunk_grid


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
        """What is not finite in a file, read chunk by chunk; one entry for a chunk.

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

    def _place(self, name: str, chunk: ChunkStorageMetadata) -> _StorageInfo | None:
        return self._places.get(MetadataIndex(name, chunk.offsets))

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


class FolderFile:
    """One `.distcp` file of a folder under construction; files can be written by different processes."""

    def __init__(self, folder: Path, number: int) -> None:
        self.name = f"__0_{number}.distcp"
        self._path = folder / self.name

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> tuple[list[StoredItem], FileRecord]:
        """Write full tensors, each in the chunks of `chunk_grid`, durably."""
        stored: list[StoredItem] = []
        with writing(self._path) as file:
            for name, tensor in tensors:
                axis, count = chunk_grid(name, tuple(tensor.shape))
                size = tensor.shape[axis] // count if tensor.dim() else 1
                for number in range(count):
                    chunk = tensor.narrow(axis, number * size, size).contiguous() if count > 1 else tensor
                    offset = [number * size if a == axis else 0 for a in range(tensor.dim())]
                    index = MetadataIndex(name, offset)
                    stored.append(write_item(file, self.name, index, with_own_storage(chunk)))
            return stored, file.sync()


def finish_folder(
    folder: Path, specs: Mapping[str, TensorSpec], items: Iterable[StoredItem]
) -> dict[str, FileRecord]:
    """Write what makes written files a folder that megatron-core loads: index, empty common part, format mark."""
    entries: dict[str, STORAGE_TYPES] = {name: _index_entry(name, spec) for name, spec in specs.items()}
    nothing = io.BytesIO()
    torch.save({}, nothing)
    mark = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    records = {
        COMMON_NAME: write_bytes(folder / COMMON_NAME, nothing.getvalue()),
        "metadata.json": write_bytes(folder / "metadata.json", json.dumps(mark).encode()),
        INDEX_NAME: write_index(folder, Metadata(state_dict_metadata=entries), items),
    }
    sync_directory(folder)
    return records


def _index_entry(name: str, spec: TensorSpec) -> TensorStorageMetadata:
    axis, count = chunk_grid(name, spec.shape)
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
