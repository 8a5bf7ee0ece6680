"""Weights of a checkpoint as the source of a conversion, checked as far as is possible without reading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.file_checks import size_problem
from megatron_qwenvl.checkpoint.storage.manifest import MODEL_FOLDER, Manifest, read_manifest
from megatron_qwenvl.checkpoint.storage.run_folder import find_checkpoint
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.checkpoint.storage.writing import FileRecord
from megatron_qwenvl.config.schema import ModelConfig
from megatron_qwenvl.engine.checkpoint_tensors import DistributedFolder
from megatron_qwenvl.model.shapes import tensor_shapes

_NAMED = 8
"""Problems that an error names; `verify` names all."""


@dataclass(frozen=True)
class WeightsSource:
    """The weights of a checkpoint."""

    path: Path
    """The checkpoint's directory."""
    manifest: Manifest
    """Its manifest."""
    folder: DistributedFolder
    """Its tensors."""

    @property
    def files(self) -> dict[str, FileRecord]:
        """The recorded files that hold the weights, by path relative to `path`."""
        return self.manifest.files_in(MODEL_FOLDER)


def open_source(path: Path) -> WeightsSource:
    """Open a checkpoint after checking sizes of files, and names and shapes of tensors; digests are not compared.

    Args:
        path: checkpoint directory, a run's checkpoints folder or a run's directory.

    Raises:
        CheckpointError: there is no checkpoint, or naming what is wrong with it.
    """
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    source = WeightsSource(checkpoint, manifest, DistributedFolder(checkpoint / MODEL_FOLDER))
    sized = [size_problem(checkpoint / name, record) for name, record in sorted(source.files.items())]
    problems = [problem for problem in sized if problem]
    problems += [f"{checkpoint}: {text}" for text in tensor_problems(source.folder.specs, manifest.model)]
    problems += [f"{checkpoint}: {name}: its chunks do not add up" for name in source.folder.uncovered()]
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise CheckpointError("; ".join(problems[:_NAMED]) + more)
    return source


def tensor_problems(found: Mapping[str, TensorSpec], model: ModelConfig) -> list[str]:
    """List the differences of tensors from those that the model has."""
    expected = tensor_shapes(model)
    problems = [f"tensor {name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"tensor {name} does not belong to the model" for name in found.keys() - expected]
    problems += [
        f"tensor {name}: expected {list(shape)}, found {list(found[name].shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    return sorted(problems)
