"""Disk space of a run's checkpoints."""

from __future__ import annotations

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.model.shapes import state_bytes


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one training checkpoint of the run: weights and optimizer state.

    File headers, indices and the manifest, some kB per tensor, are not counted.
    """
    size = state_bytes(config)
    return size.weights + size.optimizer


def checkpoints_to_come(config: RunConfig, kept: int) -> int:
    """Number of checkpoints that the run writes before the first one is removed: a new one is complete before that.

    Args:
        config: the run.
        kept: checkpoints that it has already.
    """
    return max(1, config.checkpoint.keep_last + 1 - kept)
