"""Published weights into a weights checkpoint that any layout loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_qwenvl.config.schema import ModelConfig, RunConfig
from megatron_qwenvl.model.shapes import tensor_shapes

from .convert import Part, our_specs, run_jobs, split_into_files, to_ours
from .exports import published_table
from .files import CheckpointError, FileRecord, OnBytes, new_directory
from .items import StoredItem
from .manifest import MODEL_FOLDER, Manifest, write_manifest
from .names import (
    TABLE_NAME,
    Rule,
    hf_clip_rules,
    open_clip_rules,
    padded_qwen_rules,
    qwen_rules,
    qwenvl_rules,
)
from .published import PublishedWeights, read_json
from .published_config import read_model
from .stream import FolderFile, TensorSpec, finish_folder

_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")
"""Constants that some published files carry along."""


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
    known = {name for rule in rules for name in rule.theirs} | {TABLE_NAME}
    unknown = sorted(name for name in weights.specs.keys() - known if not _BUFFERS.search(name))
    if unknown:
        raise CheckpointError(f"{directory}: {len(unknown)} unknown tensors, the first: {unknown[0]}")
    _check_table(directory, weights, model)
    image_size = read_json(directory / "config.json")["visual"].get("image_size")
    manifest = Manifest(
        kind="weights", origin="published", recipe="import-qwenvl", image_size=image_size, model=model
    )
    return _checked(directory, (Part(weights, tuple(rules)),), manifest, (f"published Qwen-VL: {directory}",))


def _check_table(directory: Path, weights: PublishedWeights, model: ModelConfig) -> None:
    """The adapter's position table is not stored, so the published one must be the constant it is meant to be."""
    if TABLE_NAME not in weights.specs:
        return
    found = weights.read(TABLE_NAME)
    expected = published_table(model.adapter.query_grid, model.decoder.hidden, found.dtype)
    if found.shape != expected.shape or not torch.allclose(found.float(), expected.float(), atol=1e-2):
        raise CheckpointError(f"{directory}: {TABLE_NAME} is not the constant sin-cos table")


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
    _check_heads(vit, llm, model)
    vit_rules = hf_clip_rules(model) if hugging_face else open_clip_rules(model)
    decoder = Part(language, tuple(padded_qwen_rules(model)))
    dtype = our_specs(Part(language, (qwen_rules(model)[0],)))["embedding.word_embeddings.weight"].dtype
    adapter = FreshAdapter(model, seed, dtype)
    parts = (
        Part(vision, tuple(vit_rules)),
        Part(adapter, tuple(Rule((name,), (name,)) for name in adapter.specs)),
        decoder,
    )
    manifest = Manifest(
        kind="weights", origin="parts", start_of="stage1", recipe="import-parts", image_size=224, model=model
    )
    layout = "Hugging Face" if hugging_face else "OpenCLIP"
    notes = (f"ViT ({layout} layout): {vit}", f"decoder: {llm}", f"adapter: fresh, seed {seed}")
    return _checked(vit, parts, manifest, notes)


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


def _check_heads(vit: Path, llm: Path, model: ModelConfig) -> None:
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
    found = read_json(llm / "config.json").get("num_attention_heads")
    _expect(llm / "config.json", "num_attention_heads", found, model.decoder.heads)


def _expect(path: Path, key: str, found: object, expected: object) -> None:
    if found is not None and found != expected:
        raise CheckpointError(f"{path}: {key}: expected {expected}, found {found}")


def _checked(path: Path, parts: tuple[Part, ...], manifest: Manifest, notes: tuple[str, ...]) -> Import:
    try:
        specs = {name: spec for part in parts for name, spec in our_specs(part).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for name, shape in tensor_shapes(manifest.model).items():
        if name not in specs:
            raise CheckpointError(f"{path}: nothing gives {name}")
        if specs[name].shape != shape:
            raise CheckpointError(f"{path}: {name}: expected {list(shape)}, found {list(specs[name].shape)}")
    return Import(parts, specs, manifest, notes)


def carry_out_import(plan: Import, out: Path, on_bytes: OnBytes = lambda count: None) -> None:
    """Write the weights checkpoint.

    Raises:
        CheckpointError: `out` exists, or a source cannot be read.
    """
    with new_directory(out) as aside:
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


def _write_file(job: _FileJob) -> tuple[int, tuple[str, list[StoredItem], FileRecord]]:
    file = FolderFile(job.folder, job.number)
    items, record = file.write(to_ours(job.part))
    return record.bytes, (file.name, items, record)
