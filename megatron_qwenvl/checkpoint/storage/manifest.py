"""The manifest of a checkpoint: its description, with size and digest of every file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_qwenvl.config.schema import ModelConfig, Stage
from megatron_qwenvl.runtime.retry import retry_read

from .errors import CheckpointError
from .json_text import parse_json
from .writing import FileRecord, replace_bytes

FORMAT = 1
MANIFEST_NAME = "manifest.json"
MODEL_FOLDER = "model"
OPTIMIZER_FOLDER = "optimizer"

Origin = Literal["parts", "stage1", "stage2", "stage3", "published"]


class HFMetadata(BaseModel):
    """Metadata beside the weights of a Hugging Face directory. It is kept through training stages and conversions, read
    by the generator and written by an export. Code is not part of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seq_length: int = Field(2048, ge=2)
    """Length in tokens that the decoder was trained at; longer prompts are extended, see `model/long_context.py`."""
    use_dynamic_ntk: bool = True
    """A prompt longer than `seq_length` widens the rotary base."""
    use_logn_attn: bool = True
    """Queries at positions beyond `seq_length` are scaled by log-n."""
    config: dict[str, Any] = {}
    """Other keys of its `config.json` that change neither tensors nor results; JSON values."""
    generation: dict[str, Any] | None = None
    """Its `generation_config.json`, JSON values; None: there was none."""
    tokenizer: str | None = None
    """SHA-256 of its `qwen.tiktoken` or `tokenizer.json`, lower-case hexadecimal; None: there was none."""
    table_drift: float | None = None
    """Largest difference of its adapter's position table from the constant one; None: rounding at most."""

    @property
    def chats(self) -> bool:
        """Whether the weights are a chat model's."""
        return (self.generation or {}).get("chat_format") == "chatml"


class Manifest(BaseModel):
    """Describes one checkpoint directory. Stored as JSON with a digest over itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    format: Literal[1] = 1
    """Version of the manifest."""
    kind: Literal["training", "weights"]
    """`training`: weights, optimizer state and progress of a run; `weights`: weights alone."""
    origin: Origin
    """Last origin of the weights: `parts` (OpenCLIP ViT, Qwen-7B, new adapter), a training stage, or
    `published` (an imported Qwen-VL)."""
    start_of: Stage | None = None
    """The training stage that a weights checkpoint was made to start; None: any."""
    step: int = 0
    """Optimizer steps done in the training stage `origin`."""
    steps: int | None = None
    """Optimizer steps planned for the training stage; None: unknown, or not a training run."""
    recipe: str
    """Name of the run's recipe, or of the command that made the weights."""
    image_size: int | None = None
    """Side in pixels that the weights were trained at."""
    model: ModelConfig
    """Shape of the model."""
    parallel_sizes: dict[str, int] = Field({}, validation_alias="layout", serialization_alias="layout")
    """Sizes of the parallel layout that wrote the checkpoint, for information: any layout can read it."""
    hf_metadata: HFMetadata | None = Field(
        None, validation_alias="published", serialization_alias="published"
    )
    """Metadata of the Hugging Face directory that the weights come from; None: unknown."""
    progress: dict[str, Any] = {}
    """Counters and schedule of the run, as given by the trainer; JSON values."""
    files: dict[str, FileRecord] = {}
    """Every file below the checkpoint directory except the manifest, by relative path."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all recorded files."""
        return sum(record.bytes for record in self.files.values())

    def files_in(self, folder: str) -> dict[str, FileRecord]:
        """Select the recorded files below `folder`, by path relative to the checkpoint directory."""
        return {name: record for name, record in self.files.items() if name.startswith(folder + "/")}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest durably; it is the last file of a checkpoint to be written."""
    content = manifest.model_dump(mode="json", by_alias=True)
    text = json.dumps({**content, "digest": _digest(content)}, indent=1, sort_keys=True)
    replace_bytes(directory / MANIFEST_NAME, text.encode())


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a checkpoint directory.

    Raises:
        CheckpointError: it is missing, damaged or of another format.
    """
    path = directory / MANIFEST_NAME
    try:
        content = parse_json(retry_read(path, path.read_bytes))
        digest = content.pop("digest")
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: not a checkpoint (no {MANIFEST_NAME})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: damaged: not the JSON of a manifest") from None
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT}, found {content.get('format')}")
    if digest != _digest(content):
        raise CheckpointError(f"{path}: damaged: its content does not match its digest")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


def model_differences(found: ModelConfig, expected: ModelConfig) -> list[str]:
    """List the fields in which two model shapes differ, as `field: expected x, found y`; initialization is ignored."""
    flat_found, flat_expected = (
        {
            f"{part}.{field}": value
            for part, fields in model.model_dump(exclude={"init_std"}).items()
            for field, value in fields.items()
        }
        for model in (found, expected)
    )
    return [
        f"{name}: expected {flat_expected.get(name)}, found {flat_found.get(name)}"
        for name in flat_expected
        if flat_expected[name] != flat_found.get(name)
    ]
