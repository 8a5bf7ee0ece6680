"""Start of a run, found by manifests alone: its own newest checkpoint, given weights, or fresh ones.

Needs neither torch nor process groups, so that a run that cannot start is known before it holds its machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.lineage import check_run_start_order
from megatron_qwenvl.checkpoint.storage.manifest import Manifest, model_differences, read_manifest
from megatron_qwenvl.checkpoint.storage.run_folder import find_checkpoint, resumable_checkpoints
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.runtime.retry import retry_read

from .rewind import is_rewound, of_step


@dataclass(frozen=True)
class Start:
    """Start that a run would make now."""

    checkpoint: Path | None
    """Directory of the checkpoint; None: fresh weights."""
    manifest: Manifest | None
    """Its manifest."""
    damaged: tuple[str, ...] = ()
    """Problems of newer checkpoints that would be passed over, one line each."""
    own: bool = False
    """Whether the checkpoint is one of the run's own, from which it resumes."""


def find_start(config: RunConfig, from_step: int | None = None) -> Start:
    """Find what a run would start from, by the rules of a starting run but without digests: files are compared by size.

    Args:
        config: the run.
        from_step: resume from the checkpoint of this step, not from the newest one.

    Raises:
        CheckpointError: all of the run's checkpoints are damaged; the weights to start from are missing or damaged;
            or what would be used does not fit the run; there is no checkpoint of `from_step`.
    """
    folder = Path(config.run_dir) / "checkpoints"
    own = resumable_checkpoints(folder)
    if from_step is not None and not is_rewound(folder, from_step):
        own = [of_step(own, from_step)]
    damaged: list[str] = []
    for checkpoint in own:
        try:
            manifest = read_whole(checkpoint)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        check_resume(checkpoint, manifest, config)
        return Start(checkpoint, manifest, tuple(damaged), own=True)
    if own:
        raise CheckpointError(f"all {len(own)} checkpoints of the run are damaged: {damaged[0]}")
    if config.checkpoint.init_from is None:
        return Start(None, None)
    checkpoint = find_checkpoint(Path(config.checkpoint.init_from))
    manifest = read_whole(checkpoint)
    check_start(checkpoint, manifest, config)
    return Start(checkpoint, manifest)


def read_whole(checkpoint: Path) -> Manifest:
    """Read the manifest and make sure that every file has its recorded size.

    Raises:
        CheckpointError: naming the manifest or the first file that is missing or has another size.
    """
    manifest = read_manifest(checkpoint)
    for name, record in manifest.files.items():
        path = checkpoint / name
        found = retry_read(path, partial(_size, path))
        if found != record.bytes:
            was = "missing" if found is None else f"found {found}"
            raise CheckpointError(f"{path}: expected {record.bytes} bytes, {was}")
    return manifest


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def check_start(checkpoint: Path, manifest: Manifest, config: RunConfig) -> None:
    """Make sure that the checkpoint's weights fit the run.

    Raises:
        CheckpointError: another model shape, made to start another training stage, or a run's that is not before it.
    """
    if differences := model_differences(manifest.model, config.model):
        raise CheckpointError(f"{checkpoint}: another model: " + "; ".join(differences))
    if manifest.start_of not in (None, config.stage):
        raise CheckpointError(
            f"{checkpoint}: made to start {manifest.start_of}, but this run is {config.stage}"
        )
    check_run_start_order(checkpoint, manifest, config.stage)


def check_resume(checkpoint: Path, manifest: Manifest, config: RunConfig) -> None:
    """Make sure that the run can resume from one of its own checkpoints.

    Raises:
        CheckpointError: not a training checkpoint, of another training stage or of another model shape.
    """
    if manifest.kind != "training" or manifest.origin != config.stage:
        raise CheckpointError(
            f"{checkpoint}: expected training of {config.stage}, found {manifest.kind} of {manifest.origin}"
        )
    if differences := model_differences(manifest.model, config.model):
        raise CheckpointError(f"{checkpoint}: another model: " + "; ".join(differences))
