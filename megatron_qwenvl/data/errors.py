"""The two ways in which data can be bad, and the command that mends an index."""

from __future__ import annotations

import shlex
from pathlib import Path


class DataError(Exception):
    """Stops the run: the message names the file and the reason."""


class SampleError(Exception):
    """Skips one sample: the message is the reason; whoever catches it knows the sample's key."""


def index_command(directory: Path, vocabulary: str | None = None, *options: str) -> str:
    """Write the command that indexes a directory, ready to be pasted into a shell.

    Args:
        directory: holds the shards.
        vocabulary: the tokenizer's file; none: the byte-level one.
        options: further options of the tool.
    """
    tokenizer = ["--tokenizer", vocabulary] if vocabulary else []
    return shlex.join(["python", "tools/index_shards.py", str(directory), *tokenizer, *options])
