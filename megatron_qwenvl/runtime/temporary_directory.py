"""Choice of a temporary directory whose path is short enough for the sockets of loader workers."""

from __future__ import annotations

import os
import tempfile

from .processes import LaunchError

LONGEST_SOCKET = 107
"""Largest length of a Unix socket's path in bytes (`sun_path` without its terminating zero)."""
_NAME_BYTES = len("/pymp-xxxxxxxx/listener-xxxxxxxx")
_SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")


def choose_temporary_directory() -> str | None:
    """Replace `TMPDIR`, for this process and its children, if it is missing, not writable or too long for a socket.

    Returns:
        The change and its reason in one line; None if nothing was changed.

    Raises:
        LaunchError: no temporary directory is writable.
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
