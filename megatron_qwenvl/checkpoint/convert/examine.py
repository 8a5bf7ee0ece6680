"""Looking at checkpoints: what one is, whether it is whole, and in what two differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_qwenvl.checkpoint.formats.names import TABLE_NAME, Rule
from megatron_qwenvl.checkpoint.storage.differences import Difference, measure, total
from megatron_qwenvl.checkpoint.storage.files import (
    CheckpointError,
    FileRecord,
    OnBytes,
    file_problem,
    untold,
)
from megatron_qwenvl.checkpoint.storage.finite import NonFinite, merged
from megatron_qwenvl.checkpoint.storage.manifest import (
    MANIFEST_NAME,
    MODEL_FOLDER,
    OPTIMIZER_FOLDER,
    Manifest,
    find_checkpoint,
    read_manifest,
)
from megatron_qwenvl.checkpoint.storage.tensors import TensorSource, TensorSpec
from megatron_qwenvl.engine.checkpoint_index import check_data_only
from megatron_qwenvl.engine.checkpoint_tensors import DistributedFolder

from .imports import plan_qwenvl
from .jobs import Part, count_bytes, our_specs, run_jobs
from .repeat import RECORD_NAME
from .source import tensor_problems


def describe(path: Path) -> Iterator[str]:
    """Lines that tell what a checkpoint is, with a table of its files and tensors.

    Raises:
        CheckpointError: no checkpoint, or a damaged manifest or index.
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
    if manifest.layout:
        yield "written by  " + ", ".join(f"{name} {size}" for name, size in manifest.layout.items())
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


def verify(path: Path, on_bytes: OnBytes = untold) -> list[str]:
    """Everything that is wrong with a checkpoint: files against digests, files that do not belong, tensors against
    the model's configuration, NaN and infinity in weights and optimizer state, and content that is not data.

    Raises:
        CheckpointError: there is no checkpoint, or its manifest is damaged.
    """
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    jobs = [_DigestJob(checkpoint / name, record) for name, record in sorted(manifest.files.items())]
    looked_at = run_jobs(_look_at, jobs, on_bytes)
    problems = [problem for problem, _ in looked_at if problem]
    problems += [f"{checkpoint}: {bad}" for bad in merged(part for _, parts in looked_at for part in parts)]
    present = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    unexpected_files = sorted(present - manifest.files.keys() - {MANIFEST_NAME, RECORD_NAME})
    problems += [f"{checkpoint / name}: does not belong to the checkpoint" for name in unexpected_files]
    folders = [MODEL_FOLDER] if manifest.kind == "weights" else [MODEL_FOLDER, OPTIMIZER_FOLDER]
    for folder in folders:
        problems += _folder_problems(checkpoint / folder)
    return problems + _model_problems(checkpoint, manifest)


@dataclass(frozen=True)
class _DigestJob:
    path: Path
    record: FileRecord


def _look_at(job: _DigestJob) -> tuple[str | None, list[NonFinite]]:
    """What is wrong with a file, and what is not finite in it. The values are read right after the digest, while the
    system still has them in memory."""
    if problem := file_problem(job.path, job.record, count_bytes):
        return problem, []
    if job.path.suffix != ".distcp":
        return None, []
    try:
        return None, DistributedFolder(job.path.parent).non_finite(job.path.name)
    except CheckpointError:
        return None, []  # of the index; reported with the folder


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


def open_weights(path: Path) -> TensorSource:
    """The weights at `path` under our names: a checkpoint, a run, or a published Qwen-VL directory (its position table
    is not among them).

    Raises:
        CheckpointError: neither.
    """
    if _is_published(path):
        return PublishedAsOurs(plan_qwenvl(path, accept_drift=True).parts[0])
    return DistributedFolder(find_checkpoint(path) / MODEL_FOLDER)


def _is_published(path: Path) -> bool:
    """Whether a directory holds a published model; a run has a `config.json` of its own."""
    return (path / "config.json").is_file() and not (path / "checkpoints").is_dir()


def table_notes(path: Path) -> list[str]:
    """In what the position table of a published directory is not the constant one, which a comparison does not show:
    the table is not among our tensors. Empty for a checkpoint."""
    if not _is_published(path):
        return []
    return [f"{path}: {note}" for note in plan_qwenvl(path, accept_drift=True).notes if TABLE_NAME in note]


class PublishedAsOurs:
    """Published tensors, read under our names."""

    def __init__(self, part: Part) -> None:
        self._source = part.source
        self._specs = our_specs(part)
        self._rules: dict[str, Rule] = {name: rule for rule in part.rules for name in rule.ours}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Our names."""
        return self._specs

    def read(self, name: str) -> Tensor:
        """Read the published tensors of one of ours and convert them."""
        rule = self._rules[name]
        converted = rule.mapping.to_ours([self._source.read(theirs) for theirs in rule.theirs])
        return converted[rule.ours.index(name)]


def compare(
    a: TensorSource, b: TensorSource, tolerance: float = 0.0, on_bytes: OnBytes = untold
) -> list[str]:
    """What differs between two sets of weights, tensor by tensor.

    Args:
        a: weights under our names.
        b: other weights under our names.
        tolerance: largest absolute difference that counts as equal; 0: bit by bit, types included.
        on_bytes: told the bytes compared, counted once for both.
    """
    names = [*a.specs, *(name for name in b.specs if name not in a.specs)]
    jobs = [_CompareJob(a, b, tuple(group), tolerance) for group in _groups(names, a)]
    results = run_jobs(_differences, jobs, on_bytes, COMPARING)
    return [difference for found in results for difference in found]


COMPARING = 2
"""Processes of a comparison, which holds every tensor twice."""

_GROUP_BYTES = 256 << 20
"""A job compares about this much, so that a source is not sent along too often."""


def _groups(names: list[str], source: TensorSource) -> Iterator[list[str]]:
    """Cut names into jobs. Larger tensors share one job: no two of them are in memory at a time."""
    sizes = {name: source.specs[name].nbytes if name in source.specs else 0 for name in names}
    yield [name for name in names if sizes[name] > _GROUP_BYTES]
    group: list[str] = []
    for name in names:
        if sizes[name] <= _GROUP_BYTES:
            group.append(name)
        if sum(sizes[name] for name in group) > _GROUP_BYTES:
            yield group
            group = []
    yield group


@dataclass(frozen=True)
class _CompareJob:
    a: TensorSource
    b: TensorSource
    names: tuple[str, ...]
    tolerance: float


def _differences(job: _CompareJob) -> list[str]:
    a, b = job.a.specs, job.b.specs
    found = []
    for name in job.names:
        found.append(_difference(job, name, a.get(name), b.get(name)))
        count_bytes(a[name].nbytes if name in a else 0)
    return [difference for difference in found if difference]


def _difference(job: _CompareJob, name: str, a: TensorSpec | None, b: TensorSpec | None) -> str | None:
    if a is None or b is None:
        return f"{name}: only in the {'second' if a is None else 'first'}"
    if a.shape != b.shape or (a.dtype != b.dtype and not job.tolerance):
        return f"{name}: {a} and {b}"
    found = _measure(job.a, job.b, name)
    if job.tolerance:
        return None if found.largest <= job.tolerance else f"{name}: largest difference {found.largest:.3g}"
    if not found.count:
        return None
    return f"{name}: {found.count:,} of {found.elements:,} elements differ, by {found.largest:.3g} at most"


def _measure(a: TensorSource, b: TensorSource, name: str) -> Difference:
    """Compare a tensor of two sources, one of them chunk by chunk where it is stored so: whole tensors are large."""
    if not isinstance(a, DistributedFolder):
        a, b = b, a
    whole = b.read(name)
    if not isinstance(a, DistributedFolder):
        return measure(a.read(name), whole)
    return total(measure(piece, whole[region]) for region, piece in a.pieces(name))
