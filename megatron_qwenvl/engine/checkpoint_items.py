"""Items of torch's distributed checkpoint files: writing and reading one tensor chunk at a byte range.

A `.distcp` file is a sequence of items, each a complete `torch.save` of one chunk; the index says where each
lies. Both the writer of training ranks and the streaming converter go through here.

Relies on the layout of these files and on the fields of a place in the index, torch's `_StorageInfo`. Held by
`tests/unit/engine/test_checkpoint_files.py`.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.reading import FileSlice
from megatron_qwenvl.checkpoint.storage.writing import DigestWriter, FileRecord, write_bytes
from megatron_qwenvl.runtime.retry import retry_read

from .checkpoint_index import INDEX_NAME, load_data

INDEX_VERSION = "1.0.0"
"""torch's number for this file layout."""

StoredPlace = _StorageInfo
"""Place of an item: `relative_path` of its file, `offset` and `length` in bytes."""

StoredItem = tuple[MetadataIndex, StoredPlace]
"""An item and where it lies."""


def with_own_storage(tensor: Tensor) -> Tensor:
    """The same contiguous tensor with a storage that holds nothing else, which is what `torch.save` stores; the memory
    is shared."""
    storage, start = tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size()
    if storage.nbytes() == tensor.nbytes:
        return tensor
    own = storage[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(own, 0, tensor.shape, tensor.stride())


def write_item(
    file: DigestWriter, file_name: str, index: MetadataIndex, data: Tensor | io.BytesIO
) -> StoredItem:
    """Append one item to an open file.

    Args:
        file: the open file.
        file_name: its name relative to the folder, as the index records it.
        index: the item's name and offset in the full tensor.
        data: a contiguous CPU tensor that owns exactly its storage, or bytes that are serialised already.

    Raises:
        OSError: the file system refused.
    """
    start = file.tell()
    try:
        if isinstance(data, io.BytesIO):
            file.write(data.getbuffer())
        else:
            torch.save(data, file)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise file.failure or error from None
    return index, StoredPlace(file_name, start, file.tell() - start)


def read_item(folder: Path, where: StoredPlace) -> Tensor:
    """Read one tensor item; nothing but the item's bytes is read.

    Raises:
        CheckpointError: the bytes are missing or are not a plain tensor.
    """
    path = folder / where.relative_path
    end = where.offset + where.length
    try:
        if retry_read(path, lambda: os.stat(path)).st_size < end:
            raise CheckpointError(f"{path}: truncated: expected {end} bytes or more")
        with FileSlice(path, where.offset, where.length) as content:
            tensor = load_data(path, content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{path}: expected a tensor at byte {where.offset}, found {type(tensor).__name__}"
        )
    return tensor


def write_index(folder: Path, metadata: Metadata, items: Iterable[StoredItem]) -> FileRecord:
    """Complete `metadata` with where the items lie and write the folder's index durably."""
    metadata.storage_data = dict(items)
    metadata.storage_meta = StorageMeta()
    metadata.version = INDEX_VERSION
    return write_bytes(folder / INDEX_NAME, pickle.dumps(metadata))
