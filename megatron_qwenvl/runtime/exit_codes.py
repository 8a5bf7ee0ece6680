"""How a process of a run ends: 0 finished, 2 arguments or a configuration that cannot be used, else one of these.

Batch scripts decide by the code and by the `FAILED` lines of the log what comes next.
"""

RUN_ERROR = 1
"""Stopped for a reason that the last log line names and that will not go away by itself."""
BAD_NODES = 3
"""Preflight found nodes that are bad; without them the run may work."""
CRASHED = 70
"""An error that nobody expected, or a neighbour that vanished."""
HUNG = 71
"""No step within `runtime.hang_minutes`."""
INTERRUPTED = 75
"""Stopped at a signal with everything saved that there was to save: start it again and it goes on."""
INTERRUPTED_BY_USER = 130
"""A tool ended by Ctrl-C, as shells have it; a run saves at Ctrl-C and ends with `INTERRUPTED`."""
