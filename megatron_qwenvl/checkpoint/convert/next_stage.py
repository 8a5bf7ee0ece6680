"""Transition between training stages: the weights of a finished one become the start of the next one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.file_checks import OnBytes, copy_file, no_progress
from megatron_qwenvl.checkpoint.storage.lineage import check_stage_order
from megatron_qwenvl.checkpoint.storage.manifest import MODEL_FOLDER, Manifest, write_manifest
from megatron_qwenvl.checkpoint.storage.new_directory import new_directory
from megatron_qwenvl.checkpoint.storage.non_finite import NonFinite, describe_non_finite
from megatron_qwenvl.checkpoint.storage.writing import FileRecord, sync_directory
from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.config.schema import RunConfig, Stage
from megatron_qwenvl.engine.checkpoint_tensors import DistributedFolder

from .jobs import count_bytes, run_jobs
from .record import Conversion, write_record
from .weights_source import open_source


@dataclass(frozen=True)
class Transition:
    """A checked transition, ready to be executed."""

    source: Path
    """Checkpoint that the weights are copied from."""
    manifest: Manifest
    """Manifest of the result; its files are those to be copied."""
    notes: tuple[str, ...]
    """Lines for the user: what changes."""


def plan_transition(path: Path, target: Literal["stage2", "stage3"], force: bool = False) -> Transition:
    """Check that the weights at `path` can start the training stage `target`.

    Args:
        path: checkpoint directory, a run's checkpoints folder or a run's directory.
        target: training stage to start.
        force: accept weights that did not go through the training stage before, or not to its end.

    Raises:
        CheckpointError: there is no checkpoint, the training stage before is another one, its run was not finished, the
            checkpoint is incomplete, or the model cannot take images of the next training stage's size.
    """
    source = open_source(path)
    found = source.manifest
    if not force:
        check_stage_order(source.path, found, target, "--force to do it anyway")
    recipe = _recipe_after(found.recipe, found.origin, target)
    manifest = Manifest(
        kind="weights",
        origin=found.origin,
        start_of=target,
        step=found.step,
        steps=found.steps,
        recipe=found.recipe,
        image_size=found.image_size,
        model=found.model,
        parallel_sizes=found.parallel_sizes,
        hf_metadata=found.hf_metadata,
        files=source.files,
    )
    return Transition(source.path, manifest, _notes(source.path, found, recipe, target))


def execute_next_stage(
    transition: Transition, out: Path, on_bytes: OnBytes = no_progress, conversion: Conversion | None = None
) -> None:
    """Write the weights checkpoint and the record of `conversion`; compare every file with its digest on the way.

    Raises:
        CheckpointError: `out` exists, a source file is missing or damaged, or a tensor holds NaN or infinity.
    """
    with new_directory(out, [transition.source]) as tmp_dir:
        (tmp_dir / MODEL_FOLDER).mkdir()
        jobs = [
            _CopyJob(transition.source / name, tmp_dir / name, record)
            for name, record in transition.manifest.files.items()
        ]
        found = run_jobs(_copy, jobs, on_bytes)
        if bad := describe_non_finite(tensor for tensors in found for tensor in tensors):
            raise CheckpointError(f"{transition.source}: {bad}")
        sync_directory(tmp_dir / MODEL_FOLDER)
        write_manifest(tmp_dir, transition.manifest)
        write_record(tmp_dir, conversion)


@dataclass(frozen=True)
class _CopyJob:
    source: Path
    target: Path
    record: FileRecord


def _copy(job: _CopyJob) -> list[NonFinite]:
    copy_file(job.source, job.target, job.record, count_bytes)
    return DistributedFolder(job.source.parent).non_finite(job.source.name)


def _recipe_after(recipe: str, origin: str, target: Stage) -> RunConfig:
    """Recipe of the next stage: the one that belongs to the run's own recipe, else the paper's."""
    name = recipe.replace(origin, target)
    return RECIPES[name if name in RECIPES else target]()


def _notes(source: Path, found: Manifest, recipe: RunConfig, target: Stage) -> tuple[str, ...]:
    patch, grid = found.model.vision.patch_size, found.model.vision.position_grid
    side = recipe.data.image_size
    if side % patch:
        raise CheckpointError(
            f"{source}: images of {side} pixels do not divide into patches of {patch} pixels"
        )
    size = f"images: {found.image_size or 'unknown'} -> {side} pixels ({recipe.name})"
    if side // patch != grid:
        size += f"; position tables {grid}x{grid} are resized to {side // patch}x{side // patch} by the model"
    return (
        f"weights: {found.origin}, step {found.step}, to start {target}",
        size,
        "optimizer, schedule and step count start anew",
    )
