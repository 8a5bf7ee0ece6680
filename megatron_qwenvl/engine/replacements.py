"""Attributes of modules and classes that stand in for others, and can be put back."""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class Replacements:
    """A set of replaced attributes."""

    def __init__(self) -> None:
        self._before: dict[tuple[int, str], tuple[Any, Any]] = {}

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a module or class; what it was at first is kept."""
        self._before.setdefault((id(owner), name), (owner, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Put everything back as it was."""
        for (_, name), (owner, value) in self._before.items():
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._before.clear()

    def __bool__(self) -> bool:
        """Return whether something is replaced."""
        return bool(self._before)
