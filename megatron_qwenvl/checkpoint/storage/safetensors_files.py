"""safetensors files, read tensor by tensor and written in one pass.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the values.
Reading maps nothing into memory, so that only the requested tensors are resident.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .json_text import parse_json, show_json, show_name
from .tensors import TensorSpec
from .writing import DurableWriter

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, and where its values begin in a file."""

    spec: TensorSpec
    path: Path
    offset: int

    def read(self) -> Tensor:
        """Read the values.

        Raises:
            CheckpointError: the file ends before them.
        """
        tensor = torch.empty(self.spec.shape, dtype=self.spec.dtype)
        target = _bytes_of(tensor)
        done = 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            while done < len(target) and (count := file.readinto(target[done:])):
                done += count
        if done < len(target):
            raise CheckpointError(
                f"{self.path}: truncated: expected {self.offset + len(target)} bytes or more"
            )
        return tensor


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header: the tensors of a file.

    Raises:
        CheckpointError: not a complete safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise CheckpointError(f"{path}: not a safetensors file: header of {length} bytes in {size}")
        try:
            header = parse_json(file.read(length))
            if not isinstance(header, dict):
                raise ValueError(f"expected an object, found {show_json(header)}")
            header.pop("__metadata__", None)
            tensors = {name: _entry(path, 8 + length, name, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error}") from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].spec.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: {show_name(name)}: expected its values at byte {end}, right after the others', "
                f"found {tensor.offset}"
            )
        end += tensor.spec.nbytes
    if end != size:
        raise CheckpointError(f"{path}: expected {end} bytes, found {size}")
    return tensors


def _entry(path: Path, start: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(
            f"{show_name(name)}: expected a dtype of {', '.join(_DTYPES)}, found {show_json(dtype)}"
        )
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        found = show_json({"shape": shape, "data_offsets": offsets})
        raise ValueError(f"{show_name(name)}: expected a shape and two offsets, found {found}")
    spec = TensorSpec(tuple(shape), _DTYPES[dtype])
    if offsets[1] - offsets[0] != spec.nbytes:
        raise ValueError(f"{show_name(name)}: {spec} does not fit in {offsets[1] - offsets[0]} bytes")
    return StoredTensor(spec, path, start + offsets[0])


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a file durably while its tensors are produced.

    Args:
        path: file to write.
        specs: the tensors of the file, in the order of `tensors`.
        tensors: names and values, produced one at a time; a tensor may come in pieces along its first axis.

    Raises:
        ValueError: the tensors are not those of `specs`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with closing(DurableWriter(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        pieces = groupby(tensors, key=lambda piece: piece[0])
        for (name, spec), (found, group) in zip(specs.items(), pieces, strict=True):
            _check(name, spec, found, [_written(file, tensor) for _, tensor in group])
        file.make_durable()


def _written(file: DurableWriter, tensor: Tensor) -> TensorSpec:
    file.write(_bytes_of(tensor.contiguous()))
    return TensorSpec(tuple(tensor.shape), tensor.dtype)


def _check(name: str, spec: TensorSpec, found: str, pieces: list[TensorSpec]) -> None:
    rows = sum(piece.shape[0] for piece in pieces) if spec.shape else 0
    whole = {
        TensorSpec((rows, *piece.shape[1:]) if spec.shape else piece.shape, piece.dtype) for piece in pieces
    }
    if found != name or whole != {spec}:
        raise ValueError(f"expected {name}: {spec}, found {found}: {', '.join(map(str, pieces))}")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    if math.prod(tensor.shape) == 0:
        return memoryview(b"")
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
