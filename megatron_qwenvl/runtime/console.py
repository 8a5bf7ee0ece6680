"""Standard output of the tools."""

from __future__ import annotations

import io
import sys


def escape_undecodable_names() -> None:
    """Print file names that are not valid Unicode with escapes, where Python would raise UnicodeEncodeError."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
