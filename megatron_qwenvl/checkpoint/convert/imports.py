"""Import of published weights into a weights checkpoint that any parallel layout loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_qwenvl.checkpoint.formats.hf_config import generation_notes, read_hf_metadata, read_image_size
from megatron_qwenvl.checkpoint.formats.hf_families import hf_decoder
from megatron_qwenvl.checkpoint.formats.hf_files import HFWeights, read_json
from megatron_qwenvl.checkpoint.formats.megatron_files import FolderFile, finish_folder
from megatron_qwenvl.checkpoint.formats.model_checks import vit_problems
from megatron_qwenvl.checkpoint.formats.names import hf_clip_rules, open_clip_rules
from megatron_qwenvl.checkpoint.formats.rules import Rule
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.file_checks import OnBytes, no_progress
from megatron_qwenvl.checkpoint.storage.json_text import show_name
from megatron_qwenvl.checkpoint.storage.manifest import MODEL_FOLDER, HFMetadata, Manifest, write_manifest
from megatron_qwenvl.checkpoint.storage.new_directory import new_directory
from megatron_qwenvl.checkpoint.storage.non_finite import NonFinite, describe_non_finite
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.checkpoint.storage.writing import FileRecord
from megatron_qwenvl.config.schema import ModelConfig, RunConfig
from megatron_qwenvl.engine.checkpoint_items import StoredItem
from megatron_qwenvl.model.shapes import tensor_shapes

from .fresh_adapter import FreshAdapter
from .hf_source import check_known, checked_specs, open_qwenvl
from .jobs import counted, run_jobs
from .mapped_source import MappedSource, split_into_files, to_megatron
from .record import Conversion, write_record

_TOWER_LAYERS = ("visual.transformer.resblocks.", "vision_model.encoder.layers.")
"""Only the layers of the ViT's file must all be known: it holds other modules, which are not imported."""


@dataclass(frozen=True)
class Import:
    """A checked import, ready to be executed."""

    mapped: tuple[MappedSource, ...]
    """The sources, with the rules that map it."""
    specs: dict[str, TensorSpec]
    """The checkpoint's tensors."""
    manifest: Manifest
    """Manifest of the result, without files."""
    notes: tuple[str, ...]
    """Lines for the user: what is imported, and what to know of it."""
    sources: tuple[Path, ...]
    """Files and directories that are read."""

    @property
    def total_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(spec.nbytes for spec in self.specs.values())


def plan_qwenvl(directory: Path, accept_drift: bool = False) -> Import:
    """Check a published Qwen-VL or Qwen-VL-Chat directory.

    Args:
        directory: weights and configuration.
        accept_drift: accept a model whose position table of the adapter was trained, as the published fine-tuning does
            by accident; the imported model has the constant table.

    Raises:
        CheckpointError: see `open_qwenvl`.
    """
    found = open_qwenvl(directory, accept_drift)
    hf_metadata = read_hf_metadata(directory).model_copy(update={"table_drift": found.table_drift})
    notes = (
        f"published Qwen-VL: {directory}",
        *found.config_notes,
        *found.table_notes,
        *generation_notes(directory),
        _chat_note(hf_metadata),
    )
    manifest = Manifest(
        kind="weights",
        origin="published",
        recipe="import-qwenvl",
        image_size=read_image_size(directory / "config.json"),
        model=found.model,
        hf_metadata=hf_metadata,
    )
    return Import((found.mapped,), found.specs, manifest, notes, (directory,))


def _chat_note(hf_metadata: HFMetadata) -> str:
    if hf_metadata.generation is None:
        return "chat_format: not known, there is no generation_config.json; an export will have raw"
    return f"chat_format: {show_name(hf_metadata.generation.get('chat_format', 'raw'))}, kept for an export"


def plan_parts(vit: Path, llm: Path, recipe: RunConfig, seed: int) -> Import:
    """Check the parts that stage 1 starts from: OpenCLIP's ViT, a language model and a new adapter.

    Args:
        vit: OpenCLIP weights (in its own format or in Hugging Face's), file or directory.
        llm: Hugging Face directory of the language model, of the family of the recipe's decoder.
        recipe: recipe of the model; the weights must have its shape.
        seed: seed of the adapter's initialization.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, or of another shape than the recipe's model, or a
            configuration beside them states that they compute something else; all differences at once.
    """
    model, vit_weights, llm_weights = recipe.model, HFWeights(vit), HFWeights(llm)
    problems, assumed = _compare_configurations(vit, llm, model)
    if problems:
        raise CheckpointError("; ".join(problems))
    vision, vit_format = _map_vit(vit, vit_weights, model)
    decoder, dtype = _map_decoder(llm, llm_weights, model)
    adapter = FreshAdapter(model, seed, dtype)
    adapter_rules = tuple(Rule((name,), (name,)) for name in adapter.specs)
    given = [(vit, vision), (None, MappedSource(adapter, adapter_rules)), (llm, decoder)]
    specs: dict[str, TensorSpec] = {}
    for place, mapped in given:
        specs |= checked_specs(place, mapped, model)
    assert specs.keys() == tensor_shapes(model).keys(), "the rules cover the model"
    manifest = Manifest(
        kind="weights",
        origin="parts",
        start_of="stage1",
        recipe="import-parts",
        image_size=224,
        model=model,
        hf_metadata=read_hf_metadata(llm).model_copy(update={"generation": None}),  # the result does not chat
    )
    notes = (f"ViT ({vit_format} format): {vit}", f"decoder: {llm}", f"adapter: fresh, seed {seed}", *assumed)
    return Import(tuple(mapped for _, mapped in given), specs, manifest, notes, (vit, llm))


def _map_vit(vit: Path, weights: HFWeights, model: ModelConfig) -> tuple[MappedSource, str]:
    """The ViT's weights with their rules, and the name of their format."""
    hugging_face = any(name.startswith("vision_model.") for name in weights.specs)
    rules = hf_clip_rules(model) if hugging_face else open_clip_rules(model)
    check_known(vit, (name for name in weights.specs if name.startswith(_TOWER_LAYERS)), rules)
    return MappedSource(weights, tuple(rules)), "Hugging Face" if hugging_face else "OpenCLIP"


def _map_decoder(llm: Path, weights: HFWeights, model: ModelConfig) -> tuple[MappedSource, torch.dtype]:
    """The language model's weights with their rules, and their type."""
    known = hf_decoder(model.decoder)
    rules = known.padded_rules(model.decoder)
    check_known(llm, weights.specs, rules)
    if known.embedding not in weights.specs:
        raise CheckpointError(f"{llm}: tensor {known.embedding} is missing")
    return MappedSource(weights, tuple(rules)), weights.specs[known.embedding].dtype


def _compare_configurations(vit: Path, llm: Path, model: ModelConfig) -> tuple[list[str], list[str]]:
    """Differences of the configurations beside both parts from the model, and notes of what they leave open."""
    problems, notes = vit_problems(vit, model)
    config = llm / "config.json"
    decoder = hf_decoder(model.decoder).compare(config, read_json(config), model.decoder)
    return problems + decoder.problems, notes + decoder.notes


def execute_import(
    plan: Import, out: Path, on_bytes: OnBytes = no_progress, conversion: Conversion | None = None
) -> None:
    """Write the weights checkpoint and the record of `conversion`.

    Raises:
        CheckpointError: `out` exists, or a source cannot be read; or tensors hold NaN or infinity: the checkpoint is
            written all the same for inspection, but no command continues from it.
    """
    with new_directory(out, plan.sources) as tmp_dir:
        folder = tmp_dir / MODEL_FOLDER
        folder.mkdir()
        pieces = [
            piece
            for mapped in plan.mapped
            for piece in split_into_files(mapped, plan.specs, lambda rule: rule.megatron)
        ]
        jobs = [_FileJob(folder, number, piece) for number, piece in enumerate(pieces)]
        written = run_jobs(_write_file, jobs, on_bytes)
        records = {name: record for name, _, record, _ in written}
        records |= finish_folder(folder, plan.specs, (item for _, items, _, _ in written for item in items))
        files = {f"{MODEL_FOLDER}/{name}": record for name, record in records.items()}
        write_manifest(tmp_dir, plan.manifest.model_copy(update={"files": files}))
        bad = describe_non_finite(tensor for _, _, _, found in written for tensor in found)
        write_record(tmp_dir, None if bad else conversion)
    if bad:
        raise CheckpointError(
            f"{bad}. {out} is kept to be looked at with inspect, compare and verify; next-stage and export refuse it"
        )


@dataclass(frozen=True)
class _FileJob:
    folder: Path
    number: int
    mapped: MappedSource


def _write_file(job: _FileJob) -> tuple[str, list[StoredItem], FileRecord, list[NonFinite]]:
    file, bad = FolderFile(job.folder, job.number), list[NonFinite]()
    items, record = file.write(counted(to_megatron(job.mapped, bad)))
    return file.name, items, record, bad
