"""Export of a checkpoint into the Hugging Face format of Qwen-VL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_qwenvl.checkpoint.formats.hf_config import (
    generation_config,
    hf_config,
    hf_limits,
    tokenizer_digest,
)
from megatron_qwenvl.checkpoint.formats.hf_families import hf_decoder
from megatron_qwenvl.checkpoint.formats.names import TABLE_NAME, qwenvl_rules
from megatron_qwenvl.checkpoint.formats.position_table import PositionTable
from megatron_qwenvl.checkpoint.formats.rules import Rule
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.file_checks import OnBytes, file_problem, no_progress
from megatron_qwenvl.checkpoint.storage.manifest import MODEL_FOLDER, Manifest
from megatron_qwenvl.checkpoint.storage.new_directory import new_directory
from megatron_qwenvl.checkpoint.storage.non_finite import NonFinite, describe_non_finite
from megatron_qwenvl.checkpoint.storage.safetensors_files import write_safetensors
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.checkpoint.storage.writing import FileRecord, write_bytes
from megatron_qwenvl.runtime.listing import matching_entries

from .jobs import counted, run_jobs
from .mapped_source import MappedSource, hf_specs, split_into_files, to_hf
from .record import Conversion, write_record
from .weights_source import WeightsSource, open_source

_DEFAULT_IMAGE_SIZE = 448


_TOKENIZER_FILES = (
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
    """A checked export, ready to be executed."""

    source: WeightsSource
    """The checkpoint."""
    mapped: tuple[MappedSource, ...]
    """The source, with the rules that map it."""
    specs: dict[str, TensorSpec]
    """The tensors of the result."""
    tokenizer: tuple[Path, ...]
    """Files to copy beside the weights."""
    notes: tuple[str, ...]
    """Lines for the user: what the export is, and what it lacks."""

    @property
    def total_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(spec.nbytes for spec in self.specs.values())


def plan_export(path: Path, tokenizer: Path | None = None) -> Export:
    """Check that a checkpoint can be written in the Hugging Face format.

    Args:
        path: checkpoint directory, a run's checkpoints folder or a run's directory.
        tokenizer: file, or directory whose tokenizer and code files are copied.

    Raises:
        CheckpointError: there is no checkpoint, it is incomplete, or there is no tokenizer at `tokenizer`.
    """
    source = open_source(path)
    model = source.manifest.model
    table = PositionTable(model, source.folder.specs)
    mapped = (
        MappedSource(source.folder, tuple(qwenvl_rules(model))),
        MappedSource(table, (Rule((TABLE_NAME,), (TABLE_NAME,)),)),
    )
    try:
        specs = {name: spec for one in mapped for name, spec in hf_specs(one).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from None
    extra_files = _tokenizer_files(tokenizer)
    return Export(source, mapped, specs, extra_files, _notes(source.manifest, extra_files))


def _notes(manifest: Manifest, extra_files: tuple[Path, ...]) -> tuple[str, ...]:
    chat, origin, known = _is_chat(manifest), manifest.hf_metadata, hf_decoder(manifest.model.decoder)
    kind = known.chat_model if chat else known.pretrained_model
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
    notes += [f"note: the published code differs: {limit}" for limit in hf_limits(manifest.model)]
    vocabulary = next((file for file in extra_files if file.name == known.tokenizer_file), None)
    if vocabulary is None:
        notes.append(
            f"note: without {known.tokenizer_file}; --tokenizer takes it and its companions from a directory"
        )
    elif origin is not None and origin.tokenizer not in (None, tokenizer_digest(vocabulary)):
        notes.append(
            f"note: {vocabulary} is not the vocabulary of the imported directory; ids may mean other text"
        )
    if missing := sorted(set(known.code_files) - {file.name for file in extra_files}):
        notes.append(
            f"note: config.json names {' and '.join(missing)}, which --tokenizer did not give; copy the published "
            "directory's *.py there to load the model"
        )
    return tuple(notes)


def _is_chat(manifest: Manifest) -> bool:
    if manifest.origin == "published":
        return manifest.hf_metadata is not None and manifest.hf_metadata.chats
    return manifest.origin == "stage3"  # trained on dialogues


def _tokenizer_files(path: Path | None) -> tuple[Path, ...]:
    if path is None:
        return ()
    if path.is_file():
        if path.name in _CONFIGURATIONS or path.suffix == ".safetensors":
            raise CheckpointError(f"{path}: not a tokenizer; the export writes its own {path.name}")
        return (path,)
    files = {
        file for pattern in _TOKENIZER_FILES for file in matching_entries(path, pattern) if file.is_file()
    }
    if not files:
        raise CheckpointError(f"{path}: no tokenizer file ({', '.join(_TOKENIZER_FILES)})")
    return tuple(sorted(files))


def execute_export(
    plan: Export, out: Path, on_bytes: OnBytes = no_progress, conversion: Conversion | None = None
) -> None:
    """Write sharded safetensors with their index, configuration and tokenizer files and the record of `conversion`, and
    compare every file of the source with its digest meanwhile.

    Raises:
        CheckpointError: `out` exists, or the checkpoint is damaged, named file by file, or holds NaN or infinity.
    """
    with new_directory(out, [plan.source.path]) as tmp_dir:
        pieces = [
            piece
            for mapped in plan.mapped
            for piece in split_into_files(mapped, plan.specs, lambda rule: rule.hf)
        ]
        names = [f"model-{i:05d}-of-{len(pieces):05d}.safetensors" for i in range(1, len(pieces) + 1)]
        files = dict(zip(names, pieces, strict=True))
        _run(plan, [_FileJob(tmp_dir / name, piece) for name, piece in files.items()], on_bytes)
        for name, content in _configurations(plan, files).items():
            write_bytes(tmp_dir / name, json.dumps(content, indent=2).encode())
        for file in plan.tokenizer:
            write_bytes(tmp_dir / file.name, file.read_bytes())
        write_record(tmp_dir, conversion)


def _configurations(plan: Export, files: Mapping[str, MappedSource]) -> dict[str, object]:
    """Content of the index and of the configurations beside the weights, by file name."""
    weight_map = {
        tensor: name for name, mapped in files.items() for rule in mapped.rules for tensor in rule.hf
    }
    index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    manifest = plan.source.manifest
    dtype = str(plan.specs[hf_decoder(manifest.model.decoder).embedding].dtype).removeprefix("torch.")
    size = manifest.image_size or _DEFAULT_IMAGE_SIZE
    config = hf_config(manifest.model, size, dtype, manifest.hf_metadata)
    contents = (
        index,
        config,
        generation_config(manifest.model.decoder, _is_chat(manifest), manifest.hf_metadata),
    )
    return dict(zip(_CONFIGURATIONS, contents, strict=True))


@dataclass(frozen=True)
class _FileJob:
    path: Path
    mapped: MappedSource


@dataclass(frozen=True)
class _DigestJob:
    path: Path
    record: FileRecord


def _run(plan: Export, jobs: list[_FileJob], on_bytes: OnBytes) -> None:
    """Write the files and digest the sources.

    Raises:
        CheckpointError: naming every damaged file of the source, or tensors that are not finite, or another error.
    """
    digests = {name: _DigestJob(plan.source.path / name, r) for name, r in sorted(plan.source.files.items())}
    try:
        found = run_jobs(_work, _in_reading_order(plan, digests, jobs), on_bytes)
    except CheckpointError:
        # A damaged file may be the cause; the digests show it.
        found = run_jobs(_work, list(digests.values()), no_progress)
        if not any(found):
            raise
    if problems := [problem for problem in found if problem]:
        raise CheckpointError("; ".join(problems))


def _in_reading_order(
    plan: Export, digests: Mapping[str, _DigestJob], jobs: list[_FileJob]
) -> Iterator[_FileJob | _DigestJob]:
    """Order the jobs so that a file is digested right before the first job that reads it: the disk is read once."""
    left = dict(digests)
    for job in jobs:
        if job.mapped.source is plan.source.folder:
            read = {
                file
                for rule in job.mapped.rules
                for name in rule.megatron
                for file in plan.source.folder.files_of(name)
            }
            for name in sorted(f"{MODEL_FOLDER}/{file}" for file in read):
                if name in left:
                    yield left.pop(name)
        yield job
    yield from left.values()


def _work(job: _FileJob | _DigestJob) -> str | None:
    """Do a job; returns what is wrong with a source file or with tensors, or None."""
    if isinstance(job, _DigestJob):
        return file_problem(job.path, job.record)
    specs, bad = hf_specs(job.mapped), list[NonFinite]()
    write_safetensors(job.path, specs, counted(to_hf(job.mapped, bad)))
    return describe_non_finite(bad) or None
