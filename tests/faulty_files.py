"""A file system that refuses: makes calls that open, read, list or look at files below a folder fail for a while."""

from __future__ import annotations

import builtins
import errno
import io
import os
import pathlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

OS_OPEN = os.open


class FaultyFiles:
    """Fails the first `times` calls for each file below `folder`, or for one whose name ends with `suffix`.

    Args:
        patch: restores everything at the end of a test.
        folder: only what lies there.
        error: the number of the error.
        times: calls that fail for each file and kind of call; a large number: it never works.
        suffix: only files whose name ends so.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        folder: Path,
        error: int = errno.EIO,
        times: int = 1,
        suffix: str = "",
    ) -> None:
        self.refused: Counter[str] = Counter()
        """Calls refused, by file name."""
        self._folder, self._error, self._times, self._suffix = str(folder), error, times, suffix
        self._seen: Counter[tuple[str, str]] = Counter()
        for owner, name in (
            (os, "open"),
            (os, "stat"),
            (os, "listdir"),
            (os, "scandir"),
            (builtins, "open"),
            (io, "open"),
        ):
            patch.setattr(owner, name, self._with_path(name, getattr(owner, name)))
        patch.setattr(pathlib.Path, "stat", self._with_path("Path.stat", pathlib.Path.stat))
        patch.setattr(os, "pread", self._with_descriptor("pread", os.pread))

    def _with_path(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(path: Any, *more: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike):
                mode = more[0] if more and isinstance(more[0], str) else options.get("mode", "r")
                flags = more[0] if more and isinstance(more[0], int) else 0
                writes = call is OS_OPEN and flags & (os.O_WRONLY | os.O_RDWR)
                if "w" not in mode and "a" not in mode and not writes:
                    self._refuse(kind, os.fspath(path))
            return call(path, *more, **options)

        return checked

    def _with_descriptor(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(descriptor: int, *more: Any) -> Any:
            self._refuse(kind, os.readlink(f"/proc/self/fd/{descriptor}"))
            return call(descriptor, *more)

        return checked

    def _refuse(self, kind: str, path: str) -> None:
        if not path.startswith(self._folder) or not path.endswith(self._suffix) or path == self._folder:
            return
        self._seen[kind, path] += 1
        if self._seen[kind, path] <= self._times:
            self.refused[os.path.basename(path)] += 1
            raise OSError(self._error, os.strerror(self._error), path)
