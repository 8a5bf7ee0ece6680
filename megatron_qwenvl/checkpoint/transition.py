"""From stage to stage: the weights of a finished stage become the start of the next one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.config.schema import RunConfig, Stage
from megatron_qwenvl.model.shapes import tensor_shapes

from .convert import run_jobs
from .files import CheckpointError, FileRecord, OnBytes, copy_file, new_directory, sync_directory
from .manifest import MODEL_FOLDER, Manifest, find_checkpoint, read_manifest, write_manifest
from .stream import DistributedFolder

_STARTS_FROM: dict[str, tuple[str, ...]] = {
    "stage1": ("parts", "published"),
    "stage2": ("stage1", "published"),
    "stage3": ("stage2", "published"),
}


@dataclass(frozen=True)
class Transition:
    """A checked transition, ready to be carried out."""

    source: Path
    """Checkpoint that gives the weights."""
    manifest: Manifest
    """Manifest of the result; its files are those to be copied."""
    notes: tuple[str, ...]
    """What changes, for people."""


def plan_transition(path: Path, target: Literal["stage2", "stage3"], force: bool = False) -> Transition:
    """Check that the weights at `path` can start the stage `target`.

    Args:
        path: checkpoint directory, a run's checkpoints folder or a run's directory.
        target: stage to start.
        force: accept weights that did not go through the stage before.

    Raises:
        CheckpointError: no checkpoint, an order of stages that makes no sense, an incomplete checkpoint, or an
            image size that the model cannot take.
    """
    source = find_checkpoint(path)
    found = read_manifest(source)
    if found.origin not in _STARTS_FROM[target] and not force:
        expected = " or ".join(_STARTS_FROM[target])
        raise CheckpointError(
            f"{source}: {target} starts from {expected} weights, found {found.origin} (--force to do it anyway)"
        )
    _check_tensors(source, found)
    recipe = _recipe_after(found.recipe, found.origin, target)
    manifest = Manifest(
        kind="weights",
        origin=found.origin,
        start_of=target,
        step=found.step,
        recipe=found.recipe,
        image_size=found.image_size,
        model=found.model,
        layout=found.layout,
        files=found.part(MODEL_FOLDER),
    )
    return Transition(source, manifest, _notes(source, found, recipe, target))


def carry_out(transition: Transition, out: Path, on_bytes: OnBytes = lambda count: None) -> None:
    """Write the weights checkpoint, checking every file against its digest on the way.

    Raises:
        CheckpointError: `out` exists, or a source file is missing or damaged.
    """
    with new_directory(out) as aside:
        (aside / MODEL_FOLDER).mkdir()
        jobs = [
            _CopyJob(transition.source / name, aside / name, record)
            for name, record in transition.manifest.files.items()
        ]
        run_jobs(_copy, jobs, on_bytes)
        sync_directory(aside / MODEL_FOLDER)
        write_manifest(aside, transition.manifest)


@dataclass(frozen=True)
class _CopyJob:
    source: Path
    target: Path
    record: FileRecord


def _copy(job: _CopyJob) -> tuple[int, None]:
    copy_file(job.source, job.target, job.record)
    return job.record.bytes, None


def _check_tensors(source: Path, manifest: Manifest) -> None:
    found = DistributedFolder(source / MODEL_FOLDER).specs
    expected = tensor_shapes(manifest.model)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{source}: tensor {name} is missing")
        if name not in expected:
            raise CheckpointError(f"{source}: tensor {name} does not belong to the model")
        if found[name].shape != expected[name]:
            raise CheckpointError(
                f"{source}: tensor {name}: expected {list(expected[name])}, found {list(found[name].shape)}"
            )


def _recipe_after(recipe: str, origin: str, target: Stage) -> RunConfig:
    """The recipe of the next stage: the one that belongs to the run's own recipe, else the paper's."""
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
