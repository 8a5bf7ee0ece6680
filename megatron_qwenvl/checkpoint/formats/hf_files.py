"""Tensors in Hugging Face or OpenCLIP files: safetensors or torch, in one file or in several with an index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.json_text import parse_json, show_name
from megatron_qwenvl.checkpoint.storage.safetensors_files import StoredTensor, read_safetensors_header
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.runtime.listing import matching_entries

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_LONGEST_NAME = 255
"""Characters; no file system has a longer name of a file."""

_RELEASE_BYTES = 1 << 30
"""A torch file is mapped into memory; after reading this much the map is dropped and made anew."""


class HFWeights:
    """Tensors of a weights file or of a directory in the Hugging Face format. An index is followed: a tensor comes from
    the file that the index names, whatever other files hold under its name.

    Raises:
        CheckpointError: there are no weights, a file or a tensor of the index is missing, or a file is damaged or
            holds more than data.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stored: dict[str, StoredTensor] = {}
        self._torch: dict[str, Path] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._mapped: tuple[Path, dict[str, Tensor]] | None = None
        self._touched = 0
        for file, names in _weight_files(path).items():
            self._add(file, names)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor by its name in the files."""
        return self._specs

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: not there or not readable.
        """
        if name in self._stored:
            return self._stored[name].read()
        if name not in self._torch:
            raise CheckpointError(f"{self._path}: no tensor {name}")
        path = self._torch[name]
        if self._mapped is None or self._mapped[0] != path or self._touched > _RELEASE_BYTES:
            self._mapped, self._touched = (path, _map_torch_file(path)), 0
        tensor = self._mapped[1][name].clone(memory_format=torch.contiguous_format)
        self._touched += tensor.nbytes
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}

    def _add(self, file: Path, names: set[str] | None) -> None:
        """Add the tensors `names` of a file; None: all that it holds."""
        if file.suffix == ".safetensors":
            stored = read_safetensors_header(file)
            for name in _listed(file, stored.keys(), names):
                self._stored[name] = stored[name]
                self._specs[name] = self._new(file, name, stored[name].spec)
            return
        tensors = _map_torch_file(file)
        for name in _listed(file, tensors.keys(), names):
            self._torch[name] = file
            spec = TensorSpec(tuple(tensors[name].shape), tensors[name].dtype)
            self._specs[name] = self._new(file, name, spec)

    def _new(self, file: Path, name: str, spec: TensorSpec) -> TensorSpec:
        if name in self._specs:
            raise CheckpointError(f"{file}: the index names another file for {show_name(name)} too")
        return spec


def content_files(path: Path) -> list[Path]:
    """List the files that define published weights: weights, their index and the configurations beside them.

    Raises:
        CheckpointError: there are no weights, or a file of the index is missing.
    """
    configurations = matching_entries(path, "*.json")
    return sorted({*_weight_files(path), *configurations})


def _listed(file: Path, found: AbstractSet[str], names: set[str] | None) -> Iterable[str]:
    if names is None:
        return found
    if missing := sorted(names - found):
        raise CheckpointError(f"{file}: tensor {missing[0]} is missing, but the index names this file for it")
    return names


def _weight_files(path: Path) -> dict[Path, set[str] | None]:
    """The weight files, each with the tensors that the index assigns to it; None: all, there is no index."""
    if path.is_file():
        return {path: None}
    for index in _INDEXES:
        if (path / index).is_file():
            return {**_files_of_index(path / index)}
    for name in _SINGLE:
        if (path / name).is_file():
            return {path / name: None}
    raise CheckpointError(
        f"{path}: no weights: expected a weights file or one of {', '.join(_INDEXES + _SINGLE)}"
    )


def _files_of_index(index: Path) -> dict[Path, set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    files: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        file = index.parent / Path(str(name)).name
        files.setdefault(file, set()).add(_plain(tensor))
    for file in files:
        if len(file.name) > _LONGEST_NAME or not file.is_file():
            raise CheckpointError(
                f"{index.parent / show_name(file.name)}: missing, but {index.name} lists it"
            )
    return files


def _plain(name: str) -> str:
    """Strip the prefix of a model wrapper from a tensor's name."""
    return name.removeprefix("module.")


def _map_torch_file(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: refused: not plain weights: {reason}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: expected a dictionary of tensors, found {type(value).__name__} under {name!r:.100}"
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise CheckpointError(
                f"{path}: {show_name(name)}: expected plain values, found {_kind_of(value)}"
            )
        if _plain(name) in tensors:
            raise CheckpointError(f"{path}: holds {show_name(_plain(name))} with and without `module.`")
        tensors[_plain(name)] = value
    return tensors


def _kind_of(tensor: Tensor) -> str:
    """Describe a tensor that is not plain values in memory."""
    if tensor.is_quantized:
        return "a quantized tensor"
    return "a sparse tensor" if tensor.layout != torch.strided else "a tensor without values"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: missing or malformed.
    """
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
