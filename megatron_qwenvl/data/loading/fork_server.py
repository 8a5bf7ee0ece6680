"""Imported by the fork server of the loader's workers, and by no other process.

Stop signals do not end it. Slurm sends a job's signals to every process of it; the training process answers them by
finishing a step, for which it needs its workers, and these end when the fork server does.

It ends when the training process has ended, and removes the directory of its socket (`$TMPDIR/pymp-*`), which a
training process that was killed could not remove.
"""

from __future__ import annotations

import atexit
import shutil
from multiprocessing import forkserver
from pathlib import Path

from megatron_qwenvl.runtime.stop_signals import ignore_stop_signals


def _remove_socket_directory() -> None:
    address = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
    folder = Path(address).parent
    if folder.name.startswith("pymp-"):
        shutil.rmtree(folder, ignore_errors=True)


ignore_stop_signals()
atexit.register(_remove_socket_directory)
