"""Published weights into a weights checkpoint that any layout loads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_qwenvl.config.schema import ModelConfig, RunConfig
from megatron_qwenvl.model.shapes import tensor_shapes

from .convert import Part, counted, our_specs, run_jobs, split_into_files, to_ours
from .differences import measure
from .exports import published_table
from .files import CheckpointError, FileRecord, OnBytes, new_directory, untold
from .items import StoredItem
from .manifest import MODEL_FOLDER, Manifest, write_manifest
from .names import (
    TABLE_NAME,
    Rule,
    hf_clip_rules,
    open_clip_rules,
    padded_qwen_rules,
    qwenvl_rules,
)
from .published import PublishedWeights, read_json
from .published_config import check_decoder, read_image_size, read_model
from .stream import FolderFile, TensorSpec, finish_folder

_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|logn_tensor)$")
"""Constants that some published files carry along."""

_TOWER_LAYERS = ("visual.transformer.resblocks.", "vision_model.encoder.layers.")
"""Of the ViT's file, only the layers must be known: it holds other parts that are not imported."""

_EMBEDDING = "transformer.wte.weight"

_FLOAT32_TABLE = 1e-5
"""Largest difference of position tables of up to 16 rows between libraries; measured: 2e-6."""


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


def plan_qwenvl(directory: Path) -> Import:
    """Check a published Qwen-VL or Qwen-VL-Chat directory.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, unknown or of another shape than `config.json` says.
    """
    weights = PublishedWeights(directory)
    model = read_model(directory / "config.json", weights.specs)
    rules = qwenvl_rules(model)
    _check_known(directory, weights.specs.keys() - {TABLE_NAME}, rules)
    notes = (f"published Qwen-VL: {directory}", *_check_table(directory, weights, model))
    manifest = Manifest(
        kind="weights",
        origin="published",
        recipe="import-qwenvl",
        image_size=read_image_size(directory / "config.json"),
        model=model,
    )
    return _checked([_Given(directory, Part(weights, tuple(rules)))], manifest, notes)


def _check_table(directory: Path, weights: PublishedWeights, model: ModelConfig) -> tuple[str, ...]:
    """The adapter's position table is not stored, so the published one must be the constant it is meant to be. A note
    where it is that only to rounding: an export writes the computed one."""
    if TABLE_NAME not in weights.specs:
        return ()
    found = weights.read(TABLE_NAME)
    expected = published_table(model.adapter.query_grid, model.decoder.hidden, found.dtype)
    if found.shape == expected.shape and found.is_floating_point():
        difference = measure(found, expected)
        if difference.count == 0:
            return ()
        if difference.largest <= _rounding(found):
            return (
                f"note: {TABLE_NAME}: {difference.count:,} of {difference.elements:,} elements differ in rounding from "
                f"the computed ones, by {difference.largest:.2g} at most; an export writes the computed ones",
            )
    raise CheckpointError(f"{directory}: {TABLE_NAME} is not the constant sin-cos table")


def _rounding(table: Tensor) -> float:
    """How far two renderings of the table may be apart: a step of its type, or what other libraries' sines and powers
    differ by in float32."""
    coarse = (torch.bfloat16, torch.float16)  # a table that was widened is as coarse as before
    kind = next((k for k in coarse if torch.equal(table.to(k).to(table.dtype), table)), table.dtype)
    return max(torch.finfo(kind).eps, _FLOAT32_TABLE)


def plan_parts(vit: Path, llm: Path, recipe: RunConfig, seed: int) -> Import:
    """Check the start of stage 1: OpenCLIP's ViT, Qwen-7B and a fresh adapter.

    Args:
        vit: OpenCLIP weights (its own layout or Hugging Face's), file or directory.
        llm: Hugging Face directory of Qwen-7B.
        recipe: gives the model's shape; the weights must have it.
        seed: of the adapter's initialisation.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, or of another shape than the recipe's model.
    """
    model = recipe.model
    vision, language = PublishedWeights(vit), PublishedWeights(llm)
    hugging_face = any(name.startswith("vision_model.") for name in vision.specs)
    _check_vit_heads(vit, model)
    check_decoder(llm / "config.json", read_json(llm / "config.json"), model.decoder)
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
        kind="weights", origin="parts", start_of="stage1", recipe="import-parts", image_size=224, model=model
    )
    layout = "Hugging Face" if hugging_face else "OpenCLIP"
    notes = (f"ViT ({layout} layout): {vit}", f"decoder: {llm}", f"adapter: fresh, seed {seed}")
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
            fresh_tensor,
        )  # imports the engine, which nothing else here needs

        spec = self._specs[name]
        return fresh_tensor(name, spec.shape, self._model, self._seed).to(spec.dtype)


def _check_known(place: Path, names: Iterable[str], rules: list[Rule]) -> None:
    """Tensors that no rule takes mean that the weights are of another model, perhaps of a deeper one."""
    known = {name for rule in rules for name in rule.theirs}
    unknown = sorted(name for name in names if name not in known and not _BUFFERS.search(name))
    if unknown:
        raise CheckpointError(f"{place}: {len(unknown)} unknown tensors, the first: {unknown[0]}")


def _check_vit_heads(vit: Path, model: ModelConfig) -> None:
    """Shapes do not show the number of heads; compare it with the configuration beside the weights."""
    config = vit / "config.json"
    if config.is_file():
        vision = read_json(config).get("vision_config", {})
        _expect(
            config, "vision_config.num_attention_heads", vision.get("num_attention_heads"), model.vision.heads
        )
    config = vit / "open_clip_config.json"
    if config.is_file():
        vision = read_json(config).get("model_cfg", {}).get("vision_cfg", {})
        width = vision.get("head_width")
        _expect(config, "model_cfg.vision_cfg.head_width", width, model.vision.width // model.vision.heads)


def _expect(path: Path, key: str, found: object, expected: object) -> None:
    if found is not None and found != expected:
        raise CheckpointError(f"{path}: {key}: expected {expected}, found {found}")


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
            if spec.shape != expected[name]:
                raise CheckpointError(
                    f"{source.place}: {name}: expected {list(expected[name])}, found {list(spec.shape)}"
                )
        specs |= found
    assert specs.keys() == expected.keys(), "the rules cover the model"
    sources = tuple(source.place for source in given if source.place)
    return Import(tuple(source.part for source in given), specs, manifest, notes, sources)


def carry_out_import(plan: Import, out: Path, on_bytes: OnBytes = untold) -> None:
    """Write the weights checkpoint.

    Raises:
        CheckpointError: `out` exists, or a source cannot be read.
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
        records = {name: record for name, _, record in written}
        records |= finish_folder(folder, plan.specs, (item for _, items, _ in written for item in items))
        files = {f"{MODEL_FOLDER}/{name}": record for name, record in records.items()}
        write_manifest(aside, plan.manifest.model_copy(update={"files": files}))


@dataclass(frozen=True)
class _FileJob:
    folder: Path
    number: int
    part: Part


def _write_file(job: _FileJob) -> tuple[str, list[StoredItem], FileRecord]:
    file = FolderFile(job.folder, job.number)
    items, record = file.write(counted(to_ours(job.part)))
    return file.name, items, record
