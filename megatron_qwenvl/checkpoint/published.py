"""Published weights as a source of tensors: Hugging Face and OpenCLIP files, safetensors or torch, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import CheckpointError
from .safetensors_files import StoredTensor, read_header
from .stream import TensorSpec

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_RELEASE_BYTES = 1 << 30
"""A torch file is mapped into memory; after reading this much the map is dropped and made anew."""


class PublishedWeights:
    """The tensors of a weights file or of a directory as published.

    Raises:
        CheckpointError: no weights there, a shard missing, or a file that is damaged or holds more than data.
    """

    def __init__(self, path: Path) -> None:
        self._files = _weight_files(path)
        self._stored: dict[str, StoredTensor] = {}
        self._torch: dict[str, Path] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._mapped: tuple[Path, dict[str, Tensor]] | None = None
        self._touched = 0
        for file in self._files:
            self._add(file)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor by its published name."""
        return self._specs

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: not there or not readable.
        """
        if name in self._stored:
            return self._stored[name].read()
        if name not in self._torch:
            raise CheckpointError(f"{self._files[0].parent}: no tensor {name}")
        path = self._torch[name]
        if self._mapped is None or self._mapped[0] != path or self._touched > _RELEASE_BYTES:
            self._mapped, self._touched = (path, _map_torch_file(path)), 0
        tensor = self._mapped[1][name].clone(memory_format=torch.contiguous_format)
        self._touched += tensor.nbytes
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}

    def _add(self, file: Path) -> None:
        if file.suffix == ".safetensors":
            tensors = read_header(file)
            self._stored.update(tensors)
            self._specs.update({name: tensor.spec for name, tensor in tensors.items()})
            return
        for name, tensor in _map_torch_file(file).items():
            self._torch[name] = file
            self._specs[name] = TensorSpec(tuple(tensor.shape), tensor.dtype)


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for index in _INDEXES:
        if (path / index).is_file():
            return _shards(path / index)
    for name in _SINGLE:
        if (path / name).is_file():
            return [path / name]
    raise CheckpointError(
        f"{path}: no weights: expected a weights file or one of {', '.join(_INDEXES + _SINGLE)}"
    )


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: no weight_map")
    files = [index.parent / Path(str(name)).name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, but {index.name} lists it")
    return files


def _map_torch_file(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: refused: not plain weights: {reason}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: expected a dictionary of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: missing or malformed.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
