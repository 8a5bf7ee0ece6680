"""Directory listings that raise file-system errors.

`Path.glob` and `Path.rglob` of Python 3.12 and later treat every error of the system as an empty directory: a run whose
directory could not be read for a moment would seem to have no checkpoints.
"""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path


def matching_entries(directory: Path, pattern: str) -> list[Path]:
    """List the entries of a directory whose names match a shell pattern; empty if the directory does not exist.

    Raises:
        OSError: the directory cannot be listed.
    """
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [directory / name for name in fnmatch.filter(names, pattern)]


def entries_below(directory: Path) -> list[Path]:
    """List files and directories at any depth below a directory; symbolic links are not followed.

    Raises:
        OSError: a directory cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    return [
        Path(folder, name)
        for folder, folders, files in os.walk(directory, onerror=refuse)
        for name in (*folders, *files)
    ]
