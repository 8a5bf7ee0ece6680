"""Initialization of a run from other weights, through the model's sharded state."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import MODEL_FOLDER, Manifest, read_manifest
from megatron_qwenvl.checkpoint.storage.run_folder import find_checkpoint
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.engine.checkpoint_state import ShardedState

from .damage import find_damage
from .ranks import Ranks
from .sharded_folder import load_folder
from .start import check_start


class ModelChunk(Protocol):
    """The part of the model that one rank holds."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedState:
        """Describe the chunk's tensors with their places in the full model."""

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> Any:
        """Copy tensors into the chunk."""


def model_state(chunk: ModelChunk) -> ShardedState:
    """Make the sharded state dict of a model chunk, for saving, loading and the optimizer's state."""
    return chunk.sharded_state_dict()


def fill_model(chunk: ModelChunk, loaded: ShardedState) -> None:
    """Copy loaded tensors into the chunk.

    Raises:
        CheckpointError: a parameter was not loaded, or one was loaded that the chunk does not have.
    """
    missing, unexpected = chunk.load_state_dict(loaded, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise CheckpointError(f"model and loaded tensors differ: missing {missing}, unexpected {unexpected}")


def load_weights(path: Path, config: RunConfig, chunk: ModelChunk, ranks: Ranks | None = None) -> Manifest:
    """Load the model's weights from any checkpoint, training or weights, written at any parallel layout. Collective.

    Args:
        path: checkpoint directory, a run's checkpoints folder or a run's directory.
        config: the run that starts.
        chunk: the model part of this rank.
        ranks: all ranks; none: a group is made for this call.

    Raises:
        CheckpointError: there is none, it is damaged (named file by file), it is of another model, or it was
            made to start another stage.
    """
    ranks = ranks or Ranks(config.checkpoint.timeout_minutes)

    def find() -> tuple[Path, Manifest]:
        checkpoint = find_checkpoint(path)
        manifest = read_manifest(checkpoint)
        check_start(checkpoint, manifest, config)
        return checkpoint, manifest

    checkpoint, manifest = ranks.run_on_every_rank(find, "cannot be started from")
    if problems := find_damage(checkpoint, ranks):
        raise CheckpointError("damaged checkpoint: " + "; ".join(problems))
    fill_model(chunk, load_folder(model_state(chunk), checkpoint / MODEL_FOLDER, ranks))
    ranks.barrier()
    return manifest
