"""Published weights into a weights checkpoint that any layout loads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_qwenvl.checkpoint.formats.hf_config import (
    generation_notes,
    read_image_size,
    read_model,
    read_published,
)
from megatron_qwenvl.checkpoint.formats.hf_files import PublishedWeights, read_json
from megatron_qwenvl.checkpoint.formats.megatron_files import FolderFile, finish_folder
from megatron_qwenvl.checkpoint.formats.model_checks import compare_decoder, vit_problems
from megatron_qwenvl.checkpoint.formats.names import (
    TABLE_NAME,
    Rule,
    hf_clip_rules,
    open_clip_rules,
    padded_qwen_rules,
    qwenvl_rules,
)
from megatron_qwenvl.checkpoint.formats.position_table import check_table
from megatron_qwenvl.checkpoint.storage.files import (
    CheckpointError,
    FileRecord,
    OnBytes,
    new_directory,
    untold,
)
from megatron_qwenvl.checkpoint.storage.finite import NonFinite, describe_non_finite
from megatron_qwenvl.checkpoint.storage.json_text import show_name
from megatron_qwenvl.checkpoint.storage.manifest import MODEL_FOLDER, Manifest, Published, write_manifest
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.config.schema import ModelConfig, RunConfig
from megatron_qwenvl.engine.checkpoint_items import StoredItem
from megatron_qwenvl.model.shapes import tensor_shapes

from .jobs import Part, counted, our_specs, run_jobs, split_into_files, to_ours
from .repeat import Conversion, write_record

_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|logn_tensor)$")
"""Constants that some published files carry along."""

_TOWER_LAYERS = ("visual.transformer.resblocks.", "vision_model.encoder.layers.")
"""Of the ViT's file, only the layers must be known: it holds other parts that are not imported."""

_EMBEDDING = "transformer.wte.weight"


@dataclass(frozen=True)
class Import:
    """A checked import, ready to be carried out."""

    parts: tuple[Part, ...]
    specs: dict[str, TensorSpec]
    """The checkpoint's tensors."""
    manifest: Manifest
    """Manifest of the result, without files."""
    notes: tuple[str, ...]
    """What is imported, for people."""
    sources: tuple[Path, ...]
    """What is read."""

    @property
    def total_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(spec.nbytes for spec in self.specs.values())


def plan_qwenvl(directory: Path, accept_drift: bool = False) -> Import:
    """Check a published Qwen-VL or Qwen-VL-Chat directory.

    Args:
        directory: weights and configuration.
        accept_drift: take a model whose position table of the adapter was trained, which the published fine-tuning
            does by accident; the imported model has the constant table.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, unknown or of another shape than `config.json` says, or
            the model computes something else.
    """
    weights = PublishedWeights(directory)
    config = directory / "config.json"
    model, config_notes = read_model(config, weights.specs)
    rules = qwenvl_rules(model)
    _check_known(directory, weights.specs.keys() - {TABLE_NAME}, rules)
    drift, table_notes = check_table(directory, weights, model, accept_drift)
    published = read_published(directory).model_copy(update={"table_drift": drift})
    notes = (
        f"published Qwen-VL: {directory}",
        *config_notes,
        *table_notes,
        *generation_notes(directory),
        _chat_note(published),
    )
    manifest = Manifest(
        kind="weights",
        origin="published",
        recipe="import-qwenvl",
        image_size=read_image_size(config),
        model=model,
        published=published,
    )
    return _checked([_Given(directory, Part(weights, tuple(rules)))], manifest, notes)


def _chat_note(published: Published) -> str:
    if published.generation is None:
        return "chat_format: not known, there is no generation_config.json; an export will have raw"
    return f"chat_format: {show_name(published.generation.get('chat_format', 'raw'))}, kept for an export"


def plan_parts(vit: Path, llm: Path, recipe: RunConfig, seed: int) -> Import:
    """Check the start of stage 1: OpenCLIP's ViT, Qwen-7B and a fresh adapter.

    Args:
        vit: OpenCLIP weights (its own layout or Hugging Face's), file or directory.
        llm: Hugging Face directory of Qwen-7B.
        recipe: gives the model's shape; the weights must have it.
        seed: of the adapter's initialisation.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, or of another shape than the recipe's model, or a
            configuration beside them says that it computes something else; all that it says at once.
    """
    model = recipe.model
    vision, language = PublishedWeights(vit), PublishedWeights(llm)
    hugging_face = any(name.startswith("vision_model.") for name in vision.specs)
    problems, assumed = _configured(vit, llm, model)
    if problems:
        raise CheckpointError("; ".join(problems))
    vit_rules = hf_clip_rules(model) if hugging_face else open_clip_rules(model)
    decoder_rules = padded_qwen_rules(model)
    _check_known(vit, (name for name in vision.specs if name.startswith(_TOWER_LAYERS)), vit_rules)
    _check_known(llm, language.specs, decoder_rules)
    if _EMBEDDING not in language.specs:
        raise CheckpointError(f"{llm}: tensor {_EMBEDDING} is missing")
    adapter = FreshAdapter(model, seed, language.specs[_EMBEDDING].dtype)
    given = [
        _Given(vit, Part(vision, tuple(vit_rules))),
        _Given(None, Part(adapter, tuple(Rule((name,), (name,)) for name in adapter.specs))),
        _Given(llm, Part(language, tuple(decoder_rules))),
    ]
    manifest = Manifest(
        kind="weights",
        origin="parts",
        start_of="stage1",
        recipe="import-parts",
        image_size=224,
        model=model,
        published=read_published(llm).model_copy(
            update={"generation": None}
        ),  # what is made here does not chat
    )
    layout = "Hugging Face" if hugging_face else "OpenCLIP"
    notes = (f"ViT ({layout} layout): {vit}", f"decoder: {llm}", f"adapter: fresh, seed {seed}", *assumed)
    return _checked(given, manifest, notes)


class FreshAdapter:
    """The tensors of a newly initialised adapter, as the model itself would initialise them."""

    def __init__(self, model: ModelConfig, seed: int, dtype: torch.dtype) -> None:
        self._model = model
        self._seed = seed
        self._specs = {
            name: TensorSpec(shape, dtype)
            for name, shape in tensor_shapes(model).items()
            if name.startswith("adapter.")
        }

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The adapter's tensors under our names."""
        return self._specs

    def read(self, name: str) -> Tensor:
        """Initialise one tensor."""
        from megatron_qwenvl.model.build import (
            fresh_tensor,  # imports the engine, which nothing else here needs
        )

        spec = self._specs[name]
        return fresh_tensor(name, spec.shape, self._model, self._seed).to(spec.dtype)


def _check_known(place: Path, names: Iterable[str], rules: list[Rule]) -> None:
    """Tensors that no rule takes mean that the weights are of another model, perhaps of a deeper one."""
    known = {name for rule in rules for name in rule.theirs}
    unknown = sorted(name for name in names if name not in known and not _BUFFERS.search(name))
    if unknown:
        raise CheckpointError(f"{place}: {len(unknown)} unknown tensors, the first: {show_name(unknown[0])}")


def _configured(vit: Path, llm: Path, model: ModelConfig) -> tuple[list[str], list[str]]:
    """What the configurations beside both parts say against the model, and notes of what they leave open."""
    problems, notes = vit_problems(vit, model)
    config = llm / "config.json"
    decoder = compare_decoder(config, read_json(config), model.decoder)
    return problems + decoder.problems, notes + decoder.notes


@dataclass(frozen=True)
class _Given:
    """A part and where it comes from; None: made here."""

    place: Path | None
    part: Part


def _checked(given: list[_Given], manifest: Manifest, notes: tuple[str, ...]) -> Import:
    expected = tensor_shapes(manifest.model)
    specs: dict[str, TensorSpec] = {}
    for source in given:
        try:
            found = our_specs(source.part)
        except CheckpointError as error:
            raise CheckpointError(f"{source.place}: {error}") from None
        for name, spec in found.items():
            if not spec.dtype.is_floating_point:
                raise CheckpointError(
                    f"{source.place}: {name}: expected floating-point numbers, found {spec}"
                )
            if spec.shape != expected[name]:
                raise CheckpointError(
                    f"{source.place}: {name}: expected {list(expected[name])}, found {list(spec.shape)}"
                )
        specs |= found
    assert specs.keys() == expected.keys(), "the rules cover the model"
    sources = tuple(source.place for source in given if source.place)
    return Import(tuple(source.part for source in given), specs, manifest, notes, sources)


def execute_import(
    plan: Import, out: Path, on_bytes: OnBytes = untold, conversion: Conversion | None = None
) -> None:
    """Write the weights checkpoint and the record of `conversion`.

    Raises:
        CheckpointError: `out` exists, or a source cannot be read. Or tensors hold NaN or infinity: the checkpoint is
            written then, to be looked at; nothing that continues from it takes it.
    """
    with new_directory(out, plan.sources) as aside:
        folder = aside / MODEL_FOLDER
        folder.mkdir()
        pieces = [
            piece
            for part in plan.parts
            for piece in split_into_files(part, plan.specs, lambda rule: rule.ours)
        ]
        jobs = [_FileJob(folder, number, piece) for number, piece in enumerate(pieces)]
        written = run_jobs(_write_file, jobs, on_bytes)
        records = {name: record for name, _, record, _ in written}
        records |= finish_folder(folder, plan.specs, (item for _, items, _, _ in written for item in items))
        files = {f"{MODEL_FOLDER}/{name}": record for name, record in records.items()}
        write_manifest(aside, plan.manifest.model_copy(update={"files": files}))
        bad = describe_non_finite(part for _, _, _, parts in written for part in parts)
        write_record(aside, None if bad else conversion)
    if bad:
        raise CheckpointError(
            f"{bad}. {out} is kept to be looked at with inspect, compare and verify; next-stage and export refuse it"
        )


@dataclass(frozen=True)
class _FileJob:
    folder: Path
    number: int
    part: Part


def _write_file(job: _FileJob) -> tuple[str, list[StoredItem], FileRecord, list[NonFinite]]:
    file, bad = FolderFile(job.folder, job.number), list[NonFinite]()
    items, record = file.write(counted(to_ours(job.part, bad)))
    return file.name, items, record, bad
