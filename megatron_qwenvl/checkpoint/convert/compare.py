"""Comparison of two sets of weights, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_qwenvl.checkpoint.formats.rules import Rule
from megatron_qwenvl.checkpoint.storage.differences import Difference, measure_difference, total
from megatron_qwenvl.checkpoint.storage.file_checks import OnBytes, no_progress
from megatron_qwenvl.checkpoint.storage.manifest import MODEL_FOLDER
from megatron_qwenvl.checkpoint.storage.run_folder import find_checkpoint
from megatron_qwenvl.checkpoint.storage.tensors import TensorSource, TensorSpec
from megatron_qwenvl.engine.checkpoint_tensors import DistributedFolder

from .hf_source import open_qwenvl
from .jobs import count_bytes, run_jobs
from .mapped_source import MappedSource, megatron_specs


def open_weights(path: Path) -> TensorSource:
    """Open the weights at `path` under their megatron names.

    Args:
        path: a checkpoint, a run, or a Qwen-VL directory in the Hugging Face format, whose position table is left out.

    Raises:
        CheckpointError: it is none of these.
    """
    if _is_hf_directory(path):
        return HFAsMegatron(open_qwenvl(path, accept_drift=True).mapped)
    return DistributedFolder(find_checkpoint(path) / MODEL_FOLDER)


def _is_hf_directory(path: Path) -> bool:
    """Whether a directory is in the Hugging Face format; a run has a `config.json`, too."""
    return (path / "config.json").is_file() and not (path / "checkpoints").is_dir()


def table_notes(path: Path) -> list[str]:
    """Differences of a Qwen-VL directory's position table from the constant one. A comparison does not show them, as
    checkpoints hold no such table. Empty for a checkpoint."""
    if not _is_hf_directory(path):
        return []
    return [f"{path}: {note}" for note in open_qwenvl(path, accept_drift=True).table_notes]


class HFAsMegatron:
    """Tensors in the Hugging Face format, read under their megatron names."""

    def __init__(self, mapped: MappedSource) -> None:
        self._source = mapped.source
        self._specs = megatron_specs(mapped)
        self._rules: dict[str, Rule] = {name: rule for rule in mapped.rules for name in rule.megatron}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Specs by megatron name."""
        return self._specs

    def read(self, name: str) -> Tensor:
        """Read the tensors that give a megatron tensor, and convert them."""
        rule = self._rules[name]
        converted = rule.mapping.to_megatron([self._source.read(hf) for hf in rule.hf])
        return converted[rule.megatron.index(name)]


def compare(
    a: TensorSource, b: TensorSource, tolerance: float = 0.0, on_bytes: OnBytes = no_progress
) -> list[str]:
    """Describe the differences of two sets of weights, one line for each tensor.

    Args:
        a: weights under megatron names.
        b: other weights under megatron names.
        tolerance: largest absolute difference that counts as equal; 0: bit by bit, types included.
        on_bytes: called with the bytes compared, counted once for both.
    """
    names = [*a.specs, *(name for name in b.specs if name not in a.specs)]
    jobs = [_CompareJob(a, b, tuple(group), tolerance) for group in _groups(names, a)]
    results = run_jobs(_differences, jobs, on_bytes, WORKERS)
    return [difference for found in results for difference in found]


WORKERS = 2
"""Processes of a comparison; each holds a tensor of both sides."""

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
    """Compare a tensor of two sources, chunk by chunk if one of them is stored so, as whole tensors are large."""
    if not isinstance(a, DistributedFolder):
        a, b = b, a
    whole = b.read(name)
    if not isinstance(a, DistributedFolder):
        return measure_difference(a.read(name), whole)
    return total(measure_difference(piece, whole[region]) for region, piece in a.pieces(name))
