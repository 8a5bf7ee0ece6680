"""Imported by the fork server of the loader's workers, and by no other process: stop signals do not end it.

Slurm sends a job's signals to every process of it. The training process answers them by finishing a step, for which
it needs its workers, and these end when the fork server does.
"""

from __future__ import annotations

from megatron_qwenvl.runtime.interrupt import ignore_stop_signals

ignore_stop_signals()
