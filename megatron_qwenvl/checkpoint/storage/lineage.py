"""Order of the training stages: which weights may start which stage. Needs no torch."""

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


def check_stage_order(checkpoint: Path, manifest: Manifest, stage: Stage, remedy: str) -> None:
    """Make sure that the weights have finished the training stage before `stage`.

    Args:
        checkpoint: directory of the weights, for the message.
        manifest: its manifest.
        stage: the training stage to start.
        remedy: how to start it anyway, for the message.

    Raises:
        CheckpointError: another training stage comes before, or the run that made the weights was not finished.
    """
    if manifest.origin not in _STARTS_FROM[stage]:
        expected = " or ".join(_STARTS_FROM[stage])
        raise CheckpointError(
            f"{checkpoint}: {stage} starts from {expected} weights, found {manifest.origin} ({remedy})"
        )
    if manifest.steps is not None and manifest.step < manifest.steps:
        raise CheckpointError(
            f"{checkpoint}: {manifest.origin} was not finished: step {manifest.step} of {manifest.steps} ({remedy})"
        )


def check_run_start_order(checkpoint: Path, manifest: Manifest, stage: Stage) -> None:
    """Make sure of the same for a run of `stage` that starts from a training checkpoint directly.

    Weights of the run's own training stage are accepted: they may go through it once more, finished or not.

    Raises:
        CheckpointError: see `check_stage_order`.
    """
    if manifest.kind == "training" and manifest.origin != stage:
        remedy = (
            f"make a start with: convert_checkpoint.py next-stage --to {stage}; --force there to do it anyway"
        )
        check_stage_order(checkpoint, manifest, stage, remedy)
