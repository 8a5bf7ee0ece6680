"""A temporary directory in which the sockets between a process and its loader workers fit."""

from __future__ import annotations

import os
import tempfile

from .processes import LaunchError

LONGEST_SOCKET = 107
"""Bytes of the longest path of a Unix socket (`sun_path` without its end)."""
_NAME_BYTES = len("/pymp-xxxxxxxx/listener-xxxxxxxx")
_SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")


def choose_temporary_directory() -> str | None:
    """Let this process and its children use another temporary directory than `TMPDIR` where that is missing, may not
    be written to, or is too long for a socket's path.

    Returns:
        What was changed and why, in one line; None if nothing.

    Raises:
        LaunchError: there is no directory to use.
    """
    wanted = os.environ.get("TMPDIR")
    try:
        found = tempfile.gettempdir()  # TMPDIR, or another one where that cannot be used
    except FileNotFoundError:
        found = ""
    reason = f"TMPDIR {wanted} cannot be used" if wanted and found != os.path.abspath(wanted) else ""
    if not found or len(os.fsencode(found)) + _NAME_BYTES > LONGEST_SOCKET:
        reason = reason or f"TMPDIR {found} is too long for the path of a socket ({LONGEST_SOCKET} bytes)"
        usable = [place for place in _SHORT_PLACES if os.access(place, os.W_OK | os.X_OK)]
        if not usable:
            raise LaunchError(
                f"{reason or 'TMPDIR'}: no temporary directory can be written to; tried {', '.join(_SHORT_PLACES)}"
            )
        found = usable[0]
    if not reason:
        return None
    tempfile.tempdir = os.environ["TMPDIR"] = found
    return f"{reason}: temporary files go to {found}"
