"""A checkpoint into the published Qwen-VL layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_qwenvl.config.schema import ModelConfig

from .convert import Part, run_jobs, split_into_files, their_specs, to_theirs
from .files import CheckpointError, OnBytes, new_directory, write_bytes
from .manifest import MODEL_FOLDER, Manifest, find_checkpoint, read_manifest
from .names import TABLE_NAME, Rule, qwenvl_rules
from .published_config import generation_config, published_config, published_limits
from .safetensors_files import write_safetensors
from .stream import DistributedFolder, TensorSpec

_DEFAULT_IMAGE_SIZE = 448


@dataclass(frozen=True)
class Export:
    """A checked export, ready to be carried out."""

    manifest: Manifest
    parts: tuple[Part, ...]
    specs: dict[str, TensorSpec]
    """The published tensors."""
    tokenizer: tuple[Path, ...]
    """Files to lay beside the weights."""
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(spec.nbytes for spec in self.specs.values())


def plan_export(path: Path, tokenizer: Path | None = None) -> Export:
    """Check that a checkpoint can be written in the published layout.

    Args:
        path: checkpoint directory, a run's checkpoints folder or a run's directory.
        tokenizer: file, or directory whose files are all copied.

    Raises:
        CheckpointError: no checkpoint, a tensor missing, or no tokenizer at `tokenizer`.
    """
    source = find_checkpoint(path)
    manifest = read_manifest(source)
    folder = DistributedFolder(source / MODEL_FOLDER)
    table = PositionTable(manifest.model, folder.specs)
    parts = (
        Part(folder, tuple(qwenvl_rules(manifest.model))),
        Part(table, (Rule((TABLE_NAME,), (TABLE_NAME,)),)),
    )
    try:
        specs = {name: spec for part in parts for name, spec in their_specs(part).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    limits = tuple(f"note: the published code differs: {limit}" for limit in published_limits(manifest.model))
    return Export(manifest, parts, specs, _tokenizer_files(tokenizer), limits)


def carry_out_export(plan: Export, out: Path, on_bytes: OnBytes = lambda count: None) -> None:
    """Write sharded safetensors with their index, configuration and tokenizer files.

    Raises:
        CheckpointError: `out` exists, or the checkpoint cannot be read.
    """
    with new_directory(out) as aside:
        pieces = [
            p for part in plan.parts for p in split_into_files(part, plan.specs, lambda rule: rule.theirs)
        ]
        names = [f"model-{i:05d}-of-{len(pieces):05d}.safetensors" for i in range(1, len(pieces) + 1)]
        jobs = [_FileJob(aside / name, piece) for name, piece in zip(names, pieces, strict=True)]
        run_jobs(_write_file, jobs, on_bytes)
        weight_map = {
            tensor: name
            for name, piece in zip(names, pieces, strict=True)
            for rule in piece.rules
            for tensor in rule.theirs
        }
        index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        dtype = str(plan.specs["transformer.wte.weight"].dtype).removeprefix("torch.")
        image_size = plan.manifest.image_size or _DEFAULT_IMAGE_SIZE
        for name, content in {
            "model.safetensors.index.json": index,
            "config.json": published_config(plan.manifest.model, image_size, dtype),
            "generation_config.json": generation_config(),
        }.items():
            write_bytes(aside / name, json.dumps(content, indent=2).encode())
        for file in plan.tokenizer:
            shutil.copyfile(file, aside / file.name)


class PositionTable:
    """The adapter's constant table as a tensor source of its own."""

    def __init__(self, model: ModelConfig, specs: Mapping[str, TensorSpec]) -> None:
        self._grid = model.adapter.query_grid
        query = specs.get("adapter.query", TensorSpec((0, model.decoder.hidden), torch.float32))
        self._spec = TensorSpec((self._grid**2, model.decoder.hidden), query.dtype)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The one tensor."""
        return {TABLE_NAME: self._spec}

    def read(self, name: str) -> Tensor:
        """Compute it."""
        return published_table(self._grid, self._spec.shape[1], self._spec.dtype)


@dataclass(frozen=True)
class _FileJob:
    path: Path
    part: Part


def _write_file(job: _FileJob) -> tuple[int, None]:
    specs = their_specs(job.part)
    write_safetensors(job.path, specs, to_theirs(job.part))
    return sum(spec.nbytes for spec in specs.values()), None


def _tokenizer_files(path: Path | None) -> tuple[Path, ...]:
    if path is None:
        return ()
    files = (path,) if path.is_file() else tuple(sorted(p for p in path.glob("*") if p.is_file()))
    if not files:
        raise CheckpointError(f"{path}: no tokenizer file")
    return files


def published_table(grid: int, width: int, dtype: torch.dtype) -> Tensor:
    """The adapter's constant 2D position table `[grid^2, width]`.

    The first half of the channels encodes the column, the second half the row; each half is [sin | cos] of
    position x 10000^(-k / (width/4)), k = 0..width/4-1, in float32.
    """
    quarter = width // 4  # numpy, as the published table was made: other libraries differ in the last bit
    frequencies = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float32) / np.float32(quarter))
    angles = np.outer(np.arange(grid, dtype=np.float32), frequencies)
    line = torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))  # [grid, width/2]
    columns = line.unsqueeze(0).expand(grid, grid, -1)
    rows = line.unsqueeze(1).expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).to(dtype).contiguous()
