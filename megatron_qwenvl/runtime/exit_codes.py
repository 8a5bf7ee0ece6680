"""Exit codes of the trainer and of every command-line program.

Batch scripts decide by the code, and by the `FAILED` lines of the log, what comes next.
"""

SUCCESS = 0
"""Done; of a question (`verify`, `compare`, `run_progress --finished`) the answer yes."""
RUN_ERROR = 1
"""Refused or failed for a reason that the last line names and that will not go away by itself; of a question, no."""
USAGE_ERROR = 2
"""Arguments, a configuration or a launcher's environment that cannot be used; nothing was started."""
BAD_NODES = 3
"""Preflight found bad nodes; without them the run may work."""
CRASHED = 70
"""An unexpected error, or a lost peer."""
HUNG = 71
"""No step within `runtime.hang_minutes`."""
INTERRUPTED = 75
"""Stopped by a signal, with everything saved that there was to save: started again it goes on."""
INTERRUPTED_BY_USER = 130
"""A tool was ended by Ctrl-C, as shells report it; a run saves at Ctrl-C and ends with `INTERRUPTED`."""
