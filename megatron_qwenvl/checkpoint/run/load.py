"""Loading of a training checkpoint into the shards of this rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import (
    MODEL_FOLDER,
    OPTIMIZER_FOLDER,
    Manifest,
    read_manifest,
)
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.engine.checkpoint_state import ShardedState

from .ranks import Ranks
from .sharded_folder import load_folder, was_sharded
from .start import check_resume


@dataclass(frozen=True)
class Loaded:
    """A training checkpoint in memory."""

    manifest: Manifest
    """Its manifest; `progress` holds the values that were given to `save`."""
    model: ShardedState
    """The requested model state with tensors in place of shards."""
    optimizer: ShardedState
    """The requested optimizer state."""


def load_training(
    checkpoint: Path, config: RunConfig, model: ShardedState, optimizer: ShardedState, ranks: Ranks
) -> Loaded:
    """Load a training checkpoint, written at any parallel layout. Collective.

    Args:
        checkpoint: its directory.
        config: the run that resumes.
        model: sharded state dict that says what this rank needs of the weights.
        optimizer: the same of the optimizer.
        ranks: all ranks.

    Raises:
        CheckpointError: on every rank, if it is not a training checkpoint, is of another training stage or model, or
            holds more than data.
    """

    def read() -> Manifest:
        manifest = read_manifest(checkpoint)
        check_resume(checkpoint, manifest, config)
        return manifest

    manifest = ranks.run_on_every_rank(read, "cannot be resumed from")
    return Loaded(
        manifest,
        load_folder(model, checkpoint / MODEL_FOLDER, ranks),
        _load_optimizer(checkpoint / OPTIMIZER_FOLDER, config, optimizer, ranks),
    )


def _load_optimizer(folder: Path, config: RunConfig, state: ShardedState, ranks: Ranks) -> ShardedState:
    try:
        return load_folder(state, folder, ranks)
    except CheckpointError as error:
        saved, wanted = was_sharded(folder), config.optimizer.sharded
        if saved not in (None, wanted):
            raise CheckpointError(
                f"{folder.parent}: expected the state of an optimizer with optimizer.sharded {wanted}, found one "
                f"with {saved}: go on with --optimizer.sharded {str(saved).lower()}"
            ) from error
        if "param_groups" not in str(error):
            raise
        raise CheckpointError(
            f"{error}. Without optimizer.sharded a run cannot change between optimizer.vit_layer_decay 1 and "
            "less: set it as before"
        ) from error
