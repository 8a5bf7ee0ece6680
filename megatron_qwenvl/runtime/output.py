"""What a tool prints."""

from __future__ import annotations

import io
import sys


def print_any_name() -> None:
    """Let names that are no text be printed with escapes: Python's default is an exception."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
