"""The error that everything about checkpoints raises."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names the place, the expected and the found value."""
