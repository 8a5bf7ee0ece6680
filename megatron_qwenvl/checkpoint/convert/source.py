"""A checkpoint as the source of a conversion: found, and whole as far as that shows without reading it all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_qwenvl.checkpoint.storage.files import CheckpointError, FileRecord, size_problem
from megatron_qwenvl.checkpoint.storage.manifest import MODEL_FOLDER, Manifest, find_checkpoint, read_manifest
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.config.schema import ModelConfig
from megatron_qwenvl.engine.checkpoint_tensors import DistributedFolder
from megatron_qwenvl.model.shapes import tensor_shapes

_NAMED = 8
"""Problems that a refusal tells; `verify` tells all."""


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
        return self.manifest.part(MODEL_FOLDER)


def open_source(path: Path) -> WeightsSource:
    """Check sizes of files, and names and shapes of tensors; digests are left to whoever reads the files.

    Args:
        path: checkpoint directory, a run's checkpoints folder or a run's directory.

    Raises:
        CheckpointError: no checkpoint, or what is wrong with it.
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
    """In what tensors differ from those that the model has."""
    expected = tensor_shapes(model)
    problems = [f"tensor {name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"tensor {name} does not belong to the model" for name in found.keys() - expected]
    problems += [
        f"tensor {name}: expected {list(shape)}, found {list(found[name].shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    return sorted(problems)
