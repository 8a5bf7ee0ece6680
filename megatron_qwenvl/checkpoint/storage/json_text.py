"""JSON from foreign files: every mistake in it is a ValueError, and messages show its content on one line."""

from __future__ import annotations

import json
from typing import Any

_DEEPEST = 64
"""Levels of nesting; a configuration, an index or a manifest has fewer than ten."""

_LONGEST = 120
"""Characters of a value that a message shows."""


def parse_json(content: str | bytes) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: malformed, of another encoding than UTF, or nested more deeply than anything that is read here.
            Python's own parser raises RecursionError in that case, and so does most of what handles the result.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError(f"nested more than {_DEEPEST} levels deep") from None
    except (json.JSONDecodeError, UnicodeError):
        raise
    except ValueError:  # Python's own words name a setting of the interpreter
        raise ValueError("holds a number of thousands of digits") from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [part for item in level for part in _parts(item)]
        if not level:
            return value
    raise ValueError(f"nested more than {_DEEPEST} levels deep")


def _parts(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def show_json(value: object) -> str:
    """Format a JSON value for a message: in one line, strings quoted and escaped, cut if it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def show_name(name: str) -> str:
    """Format a key or a name for a message: unchanged if it can be printed, else like a value."""
    return name if name.isprintable() and len(name) <= _LONGEST else show_json(name)
