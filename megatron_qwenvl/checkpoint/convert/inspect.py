"""Description of a checkpoint, and the search for everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.file_checks import OnBytes, file_problem, no_progress
from megatron_qwenvl.checkpoint.storage.manifest import (
    MANIFEST_NAME,
    MODEL_FOLDER,
    OPTIMIZER_FOLDER,
    Manifest,
    read_manifest,
)
from megatron_qwenvl.checkpoint.storage.non_finite import NonFinite, merged
from megatron_qwenvl.checkpoint.storage.run_folder import find_checkpoint
from megatron_qwenvl.checkpoint.storage.writing import FileRecord
from megatron_qwenvl.engine.checkpoint_index import check_data_only
from megatron_qwenvl.engine.checkpoint_tensors import DistributedFolder
from megatron_qwenvl.runtime.listing import entries_below

from .jobs import count_bytes, run_jobs
from .record import CONVERSION_RECORD
from .weights_source import tensor_problems


def describe_checkpoint(path: Path) -> Iterator[str]:
    """Describe a checkpoint line by line, with a table of its files and tensors.

    Raises:
        CheckpointError: there is no checkpoint, or its manifest or index is damaged.
    """
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    specs = DistributedFolder(checkpoint / MODEL_FOLDER).specs
    yield f"checkpoint  {checkpoint}"
    yield f"kind        {manifest.kind}"
    steps = f"{manifest.step} of {manifest.steps}" if manifest.steps else str(manifest.step)
    yield f"weights     {manifest.origin}, step {steps}, recipe {manifest.recipe}"
    if manifest.start_of:
        yield f"starts      {manifest.start_of}"
    yield f"images      {manifest.image_size or 'unknown'} pixels"
    if manifest.parallel_sizes:
        yield "written by  " + ", ".join(f"{name} {size}" for name, size in manifest.parallel_sizes.items())
    vision, decoder = manifest.model.vision, manifest.model.decoder
    yield (
        f"model       ViT {vision.layers} x {vision.width}, decoder {decoder.layers} x {decoder.hidden}, "
        f"vocabulary {decoder.vocab_size}"
    )
    elements = sum(spec.nbytes // spec.dtype.itemsize for spec in specs.values())
    yield f"tensors     {len(specs)} with {elements:,} elements"
    yield f"bytes       {manifest.total_bytes:,} in {len(manifest.files)} files"
    for name, record in sorted(manifest.files.items()):
        yield f"  {record.sha256[:16]}  {record.bytes:>14,}  {name}"
    yield from (f"  {name}  {spec}" for name, spec in specs.items())


def verify(path: Path, on_bytes: OnBytes = no_progress) -> list[str]:
    """List everything that is wrong with a checkpoint: damaged and unexpected files, tensors that do not match the
    model's configuration, NaN and infinity in weights and optimizer state, and content that is not data.

    Raises:
        CheckpointError: there is no checkpoint, or its manifest is damaged.
    """
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    jobs = [_CheckJob(checkpoint / name, record) for name, record in sorted(manifest.files.items())]
    checked = run_jobs(_check_file, jobs, on_bytes)
    problems = [problem for problem, _ in checked if problem]
    problems += [f"{checkpoint}: {bad}" for bad in merged(tensor for _, found in checked for tensor in found)]
    present = {str(p.relative_to(checkpoint)) for p in entries_below(checkpoint) if p.is_file()}
    unexpected_files = sorted(present - manifest.files.keys() - {MANIFEST_NAME, CONVERSION_RECORD})
    problems += [f"{checkpoint / name}: does not belong to the checkpoint" for name in unexpected_files]
    folders = [MODEL_FOLDER] if manifest.kind == "weights" else [MODEL_FOLDER, OPTIMIZER_FOLDER]
    for folder in folders:
        problems += _folder_problems(checkpoint / folder)
    return problems + _model_problems(checkpoint, manifest)


@dataclass(frozen=True)
class _CheckJob:
    path: Path
    record: FileRecord


def _check_file(job: _CheckJob) -> tuple[str | None, list[NonFinite]]:
    """Compare a file with its record and look for values that are not finite; they are read right after the digest,
    while the system still has them in memory."""
    if problem := file_problem(job.path, job.record, count_bytes):
        return problem, []
    if job.path.suffix != ".distcp":
        return None, []
    try:
        return None, DistributedFolder(job.path.parent).non_finite(job.path.name)
    except CheckpointError:
        return None, []  # the index is damaged, which is reported with the folder


def _folder_problems(folder: Path) -> list[str]:
    problems = []
    try:
        index = DistributedFolder(folder)
        problems += [
            f"{folder / name}: missing, but the index refers to it" for name in index.files_missing()
        ]
        problems += [f"{folder}: {name}: its chunks do not add up" for name in index.uncovered()]
        check_data_only(folder)
    except CheckpointError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{error.filename or folder}: cannot be read ({error.strerror})")
    return problems


def _model_problems(checkpoint: Path, manifest: Manifest) -> list[str]:
    try:
        found = DistributedFolder(checkpoint / MODEL_FOLDER).specs
    except CheckpointError:
        return []  # reported with the folder
    return [f"{checkpoint}: {problem}" for problem in tensor_problems(found, manifest.model)]
