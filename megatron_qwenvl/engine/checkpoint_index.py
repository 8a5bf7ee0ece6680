"""Reading the index of a distributed checkpoint without running what it says.

torch's distributed checkpoint keeps its index, `.metadata`, as a pickle, and a pickle can name any function
to call. The unpickler here knows the few data classes that an index is made of and refuses every other name,
so an index that passes can be read by the engine as well.

Relies on the data classes of torch's index, and on the files of a folder besides tensors: the common part and the mark
of the format, which both tested versions of megatron-core read. Held by `tests/unit/engine/test_checkpoint_files.py`.
"""

from __future__ import annotations

import io
import json
import pickle
from enum import Enum
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.reading import FileSlice, open_whole
from megatron_qwenvl.checkpoint.storage.writing import FileRecord, write_bytes
from megatron_qwenvl.runtime.retry import retry_read

INDEX_NAME = ".metadata"
COMMON_NAME = "common.pt"
MARK_NAME = "metadata.json"

_MARK = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Format of a folder, as megatron-core reads it; 0.19 ignores the last two entries, 0.16 needs them."""

_METADATA = "torch.distributed.checkpoint.metadata"
_ADMITTED = {
    *((_METADATA, name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}  # fmt: skip
_DTYPES = {
    str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)
}


def _enum_member(kind: Any, name: str) -> Any:
    """Stands for `getattr`, by which some Python versions pickle an enumeration's member."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError("refused: it asks for builtins.getattr")
    return kind[name]


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if (module, name) in _ADMITTED or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}")


def read_index(folder: Path) -> Metadata:
    """Read the index of a distributed-checkpoint folder.

    Raises:
        CheckpointError: it is missing, damaged, or names anything but the index's own data classes.
    """
    path = folder / INDEX_NAME
    try:
        index = _IndexUnpickler(io.BytesIO(retry_read(path, path.read_bytes))).load()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle can raise almost anything
        raise CheckpointError(f"{path}: not a checkpoint index: {error}") from None
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise CheckpointError(f"{path}: expected a checkpoint index, found {type(index).__name__}")
    return index


def load_data(path: Path, content: IO[bytes] | io.RawIOBase | None = None) -> Any:
    """`torch.load` of plain data (tensors, numbers, strings, containers) and nothing else.

    Args:
        path: file to read, or to name in errors.
        content: an open file to read instead, such as a part of it.

    Raises:
        CheckpointError: unreadable, or it holds more than data.
    """
    try:
        if content is not None:
            return torch.load(content, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        with open_whole(path) as whole:
            return torch.load(whole, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: refused: not plain data: {reason}") from None


def write_common(folder: Path, common: dict[str, Any]) -> dict[str, FileRecord]:
    """Write the part of a folder that is the same on all ranks, and the mark of its format, durably.

    Raises:
        OSError: the file system refused.
    """
    content = io.BytesIO()
    torch.save(common, content)
    return {
        COMMON_NAME: write_bytes(folder / COMMON_NAME, content.getvalue()),
        MARK_NAME: write_bytes(folder / MARK_NAME, json.dumps(_MARK).encode()),
    }


def check_data_only(folder: Path) -> None:
    """Make sure that reading the folder runs no code: index, common part and objects hold data only.

    Raises:
        CheckpointError: naming the file and what it asked for.
    """
    index = read_index(folder)
    load_data(folder / COMMON_NAME)
    for where, place in index.storage_data.items():
        if isinstance(index.state_dict_metadata.get(where.fqn), BytesStorageMetadata):
            path = folder / place.relative_path
            with FileSlice(path, place.offset, place.length) as content:
                load_data(path, content)
