"""A checkpoint into the published Qwen-VL layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_qwenvl.checkpoint.formats.hf_config import (
    CODE_FILES,
    TOKENIZER_FILE,
    generation_config,
    published_config,
    published_limits,
    tokenizer_digest,
)
from megatron_qwenvl.checkpoint.formats.names import TABLE_NAME, Rule, qwenvl_rules
from megatron_qwenvl.checkpoint.formats.position_table import published_table
from megatron_qwenvl.checkpoint.storage.files import (
    CheckpointError,
    FileRecord,
    OnBytes,
    file_problem,
    new_directory,
    untold,
    write_bytes,
)
from megatron_qwenvl.checkpoint.storage.finite import NonFinite, describe_non_finite
from megatron_qwenvl.checkpoint.storage.manifest import MODEL_FOLDER, Manifest
from megatron_qwenvl.checkpoint.storage.safetensors_files import write_safetensors
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.config.schema import ModelConfig

from .jobs import Part, counted, run_jobs, split_into_files, their_specs, to_theirs
from .repeat import Conversion, write_record
from .source import WeightsSource, open_source

_DEFAULT_IMAGE_SIZE = 448


_BESIDE = (
    "*.py",
    "*.tiktoken",
    "SimSun.ttf",
    "added_tokens.json",
    "merges*",
    "special_tokens_map.json",
    "tokenization*",
    "tokenizer*",
    "vocab*",
)
"""Files of a published directory that belong to its tokenizer and code; the font draws boxes."""

_INDEX = "model.safetensors.index.json"
_CONFIGURATIONS = (_INDEX, "config.json", "generation_config.json")


@dataclass(frozen=True)
class Export:
    """A checked export, ready to be carried out."""

    source: WeightsSource
    """The checkpoint."""
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
        tokenizer: file, or directory whose tokenizer and code files are copied.

    Raises:
        CheckpointError: no checkpoint, one that is not whole, or no tokenizer at `tokenizer`.
    """
    source = open_source(path)
    model = source.manifest.model
    table = PositionTable(model, source.folder.specs)
    parts = (
        Part(source.folder, tuple(qwenvl_rules(model))),
        Part(table, (Rule((TABLE_NAME,), (TABLE_NAME,)),)),
    )
    try:
        specs = {name: spec for part in parts for name, spec in their_specs(part).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from None
    beside = _tokenizer_files(tokenizer)
    return Export(source, parts, specs, beside, _notes(source.manifest, beside))


def _notes(manifest: Manifest, beside: tuple[Path, ...]) -> tuple[str, ...]:
    chat, origin = _is_chat(manifest), manifest.published
    kind = "Qwen-VL-Chat" if chat else "Qwen-VL"
    if origin is not None and origin.generation is not None and origin.chats == chat:
        kind = "the imported directory"
    way = "chatml" if chat else "raw"
    notes = [f"generation_config.json: that of {kind} (chat_format {way}), for {manifest.origin} weights"]
    if manifest.origin == "published" and (origin is None or origin.generation is None):
        notes.append("note: whether the imported model chats is not known: it had no generation_config.json")
    if origin is not None and origin.table_drift is not None:
        notes.append(
            f"note: {TABLE_NAME} is the constant table; the imported one differed by {origin.table_drift:.2g} at most"
        )
    notes += [f"note: the published code differs: {limit}" for limit in published_limits(manifest.model)]
    vocabulary = next((file for file in beside if file.name == TOKENIZER_FILE), None)
    if vocabulary is None:
        notes.append(
            f"note: without {TOKENIZER_FILE}; --tokenizer takes it and its companions from a directory"
        )
    elif origin is not None and origin.tokenizer not in (None, tokenizer_digest(vocabulary.parent)):
        notes.append(
            f"note: {vocabulary} is not the vocabulary of the imported directory; ids may mean other text"
        )
    if missing := sorted(set(CODE_FILES) - {file.name for file in beside}):
        notes.append(
            f"note: config.json names {' and '.join(missing)}, which --tokenizer did not give; copy the published "
            "directory's *.py there to load the model"
        )
    return tuple(notes)


def _is_chat(manifest: Manifest) -> bool:
    if manifest.origin == "published":
        return manifest.published is not None and manifest.published.chats
    return manifest.origin == "stage3"  # trained on dialogues


def _tokenizer_files(path: Path | None) -> tuple[Path, ...]:
    if path is None:
        return ()
    if path.is_file():
        if path.name in _CONFIGURATIONS or path.suffix == ".safetensors":
            raise CheckpointError(f"{path}: not a tokenizer; the export writes its own {path.name}")
        return (path,)
    files = {file for pattern in _BESIDE for file in path.glob(pattern) if file.is_file()}
    if not files:
        raise CheckpointError(f"{path}: no tokenizer file ({', '.join(_BESIDE)})")
    return tuple(sorted(files))


def execute_export(
    plan: Export, out: Path, on_bytes: OnBytes = untold, conversion: Conversion | None = None
) -> None:
    """Write sharded safetensors with their index, configuration and tokenizer files and the record of `conversion`, and
    compare every file of the source with its digest meanwhile.

    Raises:
        CheckpointError: `out` exists, or the checkpoint is damaged, named file by file, or holds NaN or infinity.
    """
    with new_directory(out, [plan.source.path]) as aside:
        pieces = [
            p for part in plan.parts for p in split_into_files(part, plan.specs, lambda rule: rule.theirs)
        ]
        names = [f"model-{i:05d}-of-{len(pieces):05d}.safetensors" for i in range(1, len(pieces) + 1)]
        _run(
            plan, [_FileJob(aside / name, piece) for name, piece in zip(names, pieces, strict=True)], on_bytes
        )
        weight_map = {
            tensor: name
            for name, piece in zip(names, pieces, strict=True)
            for rule in piece.rules
            for tensor in rule.theirs
        }
        index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        manifest = plan.source.manifest
        dtype = str(plan.specs["transformer.wte.weight"].dtype).removeprefix("torch.")
        size = manifest.image_size or _DEFAULT_IMAGE_SIZE
        config = published_config(manifest.model, size, dtype, manifest.published)
        contents = (index, config, generation_config(_is_chat(manifest), manifest.published))
        for name, content in zip(_CONFIGURATIONS, contents, strict=True):
            write_bytes(aside / name, json.dumps(content, indent=2).encode())
        for file in plan.tokenizer:
            write_bytes(aside / file.name, file.read_bytes())
        write_record(aside, conversion)


@dataclass(frozen=True)
class _FileJob:
    path: Path
    part: Part


@dataclass(frozen=True)
class _DigestJob:
    path: Path
    record: FileRecord


def _run(plan: Export, jobs: list[_FileJob], on_bytes: OnBytes) -> None:
    """Write the files and digest the sources.

    Raises:
        CheckpointError: naming every damaged file of the source, tensors that are not finite, or what else went wrong.
    """
    digests = {name: _DigestJob(plan.source.path / name, r) for name, r in sorted(plan.source.files.items())}
    try:
        found = run_jobs(_work, _in_reading_order(plan, digests, jobs), on_bytes)
    except CheckpointError:
        # What a reader stumbled over may be damage: the digests tell.
        found = run_jobs(_work, list(digests.values()), untold)
        if not any(found):
            raise
    if problems := [problem for problem in found if problem]:
        raise CheckpointError("; ".join(problems))


def _in_reading_order(
    plan: Export, digests: Mapping[str, _DigestJob], jobs: list[_FileJob]
) -> Iterator[_FileJob | _DigestJob]:
    """A file is digested right before the first job that reads it, so that the disk gives it once."""
    left = dict(digests)
    for job in jobs:
        if job.part.source is plan.source.folder:
            read = {
                file
                for rule in job.part.rules
                for name in rule.ours
                for file in plan.source.folder.files_of(name)
            }
            for name in sorted(f"{MODEL_FOLDER}/{file}" for file in read):
                if name in left:
                    yield left.pop(name)
        yield job
    yield from left.values()


def _work(job: _FileJob | _DigestJob) -> str | None:
    """What is wrong with a source file or with tensors, or None."""
    if isinstance(job, _DigestJob):
        return file_problem(job.path, job.record)
    specs, bad = their_specs(job.part), list[NonFinite]()
    write_safetensors(job.path, specs, counted(to_theirs(job.part, bad)))
    return describe_non_finite(bad) or None


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
