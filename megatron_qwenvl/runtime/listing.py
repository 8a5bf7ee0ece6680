"""Listing folders so that a file system that refuses is noticed.

`Path.glob` and `Path.rglob` of Python 3.12 and later treat every error of the system as an empty folder: a run whose
folder could not be read for a moment would seem to have no checkpoints.
"""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path


def matching_entries(directory: Path, pattern: str) -> list[Path]:
    """Entries of a directory whose names match a shell pattern; none if the directory does not exist.

    Raises:
        OSError: the directory cannot be listed.
    """
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [directory / name for name in fnmatch.filter(names, pattern)]


def entries_below(directory: Path) -> list[Path]:
    """Files and folders at any depth below a directory, links not followed.

    Raises:
        OSError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    return [
        Path(folder, name)
        for folder, folders, files in os.walk(directory, onerror=refuse)
        for name in (*folders, *files)
    ]
