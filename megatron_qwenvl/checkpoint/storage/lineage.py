"""Which weights may start which stage: one table for `next-stage` and for runs. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_qwenvl.config.schema import Stage

from .errors import CheckpointError
from .manifest import Manifest, Origin

_STARTS_FROM: dict[Stage, tuple[Origin, ...]] = {
    "stage1": ("parts", "published"),
    "stage2": ("stage1", "published"),
    "stage3": ("stage2", "published"),
}


def check_stage_order(checkpoint: Path, manifest: Manifest, stage: Stage, way_out: str) -> None:
    """Make sure that the weights went through what comes before `stage`, to its end.

    Args:
        checkpoint: their place, for the message.
        manifest: what they are.
        stage: the stage to start.
        way_out: how to do it anyway, for the message.

    Raises:
        CheckpointError: another stage comes before, or the run that made the weights was not finished.
    """
    if manifest.origin not in _STARTS_FROM[stage]:
        expected = " or ".join(_STARTS_FROM[stage])
        raise CheckpointError(
            f"{checkpoint}: {stage} starts from {expected} weights, found {manifest.origin} ({way_out})"
        )
    if manifest.steps is not None and manifest.step < manifest.steps:
        raise CheckpointError(
            f"{checkpoint}: {manifest.origin} was not finished: step {manifest.step} of {manifest.steps} ({way_out})"
        )


def check_run_start_order(checkpoint: Path, manifest: Manifest, stage: Stage) -> None:
    """The same for a run of `stage` that starts from a training checkpoint as it is.

    The run's own stage is no skipped one: its weights may go through it once more, finished or not.

    Raises:
        CheckpointError: see `check_order`.
    """
    if manifest.kind == "training" and manifest.origin != stage:
        way_out = (
            f"make a start with: convert_checkpoint.py next-stage --to {stage}; --force there to do it anyway"
        )
        check_stage_order(checkpoint, manifest, stage, way_out)
