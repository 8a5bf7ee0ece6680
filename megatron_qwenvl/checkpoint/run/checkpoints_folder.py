"""Changes of a run's checkpoints folder, all made by rank 0.

A checkpoint is written as `step_X.tmp`, made durable, and renamed; then `latest` is replaced. A crash at any moment
leaves the older checkpoint and at most a `.tmp` that the next run removes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_qwenvl.checkpoint.storage.manifest import (
    MODEL_FOLDER,
    OPTIMIZER_FOLDER,
    Manifest,
    write_manifest,
)
from megatron_qwenvl.checkpoint.storage.run_folder import (
    POINTER_NAME,
    checkpoint_name,
    checkpoints_of_run,
    replaced_checkpoints,
)
from megatron_qwenvl.checkpoint.storage.writing import replace_bytes, sync_directory
from megatron_qwenvl.config.schema import CheckpointConfig
from megatron_qwenvl.runtime.listing import matching_entries

from .ranks import attempt
from .retention import remove_old_checkpoints
from .rewind import Rewind, move_newer_checkpoints

logger = logging.getLogger(__name__)


class CheckpointsFolder:
    """The checkpoints folder of one run, for rank 0 to change. No method is collective.

    Args:
        directory: the folder.
        keep: what is kept of older checkpoints.
    """

    def __init__(self, directory: Path, keep: CheckpointConfig) -> None:
        self.directory = directory
        """The folder."""
        self.guard: Callable[[], None] = lambda: None
        """Called before every change; raises if this process may not change the folder any more."""
        self.damaged: set[int] = set()
        """Steps whose checkpoints were found damaged."""
        self._keep = keep

    def prepare(self) -> None:
        """Remove what an interrupted run left behind, undo a half-done replacement, and let `latest` name the newest
        checkpoint. May be repeated: does only what is still to be done.

        Raises:
            OSError: the file system refuses.
        """
        self.guard()
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in matching_entries(self.directory, "step_*.tmp"):
            shutil.rmtree(leftover)
        for replaced in replaced_checkpoints(self.directory):
            if replaced.with_suffix("").exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(replaced.with_suffix(""))
        pointer = self.directory / POINTER_NAME
        newest = checkpoints_of_run(self.directory)[:1]
        if newest and not (
            pointer.is_file() and pointer.read_text(errors="replace").strip() == newest[0].name
        ):
            self._point_to(newest[0])

    def tmp_dir(self, step: int) -> Path:
        """Temporary directory in which the checkpoint of a step is written."""
        return self.directory / f"{checkpoint_name(step)}.tmp"

    def make_tmp_dir(self, step: int) -> None:
        """Make the temporary directory with its folders, empty.

        Raises:
            OSError: the file system refuses.
        """
        self.guard()
        tmp_dir = self.tmp_dir(step)
        shutil.rmtree(tmp_dir, ignore_errors=True)
        (tmp_dir / MODEL_FOLDER).mkdir(parents=True)
        (tmp_dir / OPTIMIZER_FOLDER).mkdir()

    def discard_tmp_dir(self, step: int) -> None:
        """Remove the temporary directory of a failed save, unless this process may not."""
        if attempt(self.guard) is None:
            shutil.rmtree(self.tmp_dir(step), ignore_errors=True)

    def move_into_place(self, manifest: Manifest) -> None:
        """Write the manifest of a complete temporary directory and give the checkpoint its name.

        From then on a run resumes from it, so that later errors are warnings and no failure of the save.

        Raises:
            OSError: the file system refuses; the folder is as before.
        """
        self.guard()
        tmp_dir = self.tmp_dir(manifest.step)
        write_manifest(tmp_dir, manifest)
        final = tmp_dir.with_suffix("")
        replaced = final.with_suffix(".old")
        if final.exists():  # the step was saved before, perhaps damaged: the new one takes its place
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        try:
            tmp_dir.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        self.damaged.discard(manifest.step)
        _warn("the checkpoint's name may not be durable yet", lambda: sync_directory(self.directory))
        self._point_to(final)
        shutil.rmtree(replaced, ignore_errors=True)
        _warn("older checkpoints were not removed", lambda: self._remove_old(manifest.step))

    def move_newer(self, step: int) -> Rewind:
        """Move the checkpoints after a step to where the run's own search does not find them.

        Raises:
            OSError: the file system refuses.
        """
        self.guard()
        self._point_to(self.directory / checkpoint_name(step))
        return move_newer_checkpoints(self.directory, step)

    def _remove_old(self, newest: int) -> None:
        remove_old_checkpoints(self.directory, newest, self._keep, self.damaged)

    def _point_to(self, checkpoint: Path) -> None:
        pointer = self.directory / POINTER_NAME
        _warn(
            f"{pointer} does not name {checkpoint.name}, the newest checkpoint",
            lambda: replace_bytes(pointer, f"{checkpoint.name}\n".encode()),
        )


def _warn(consequence: str, action: Callable[[], object]) -> None:
    """Do what a complete checkpoint does not depend on, and log a warning if it fails."""
    if error := attempt(action):
        logger.warning("%s: %s", consequence, error)
