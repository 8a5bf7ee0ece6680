"""Exit codes of the trainer and of every command-line program.

Batch scripts choose their next action by the exit code and by the `FAILED` lines of the log.
"""

SUCCESS = 0
"""Finished; `verify`, `compare` and `run_progress --finished`: yes."""
RUN_ERROR = 1
"""Refused or failed for a persistent reason, which the last line names; `verify`, `compare` and `--finished`: no."""
USAGE_ERROR = 2
"""Invalid arguments, configuration or launcher environment; nothing was started."""
BAD_NODES = 3
"""Preflight found bad nodes; without them the run may work."""
CRASHED = 70
"""An unexpected error, or the connection to another rank was lost."""
HUNG = 71
"""No step within `runtime.hang_minutes`."""
INTERRUPTED = 75
"""Stopped by a signal after saving; the same command resumes."""
INTERRUPTED_BY_USER = 130
"""A tool was ended by Ctrl-C, with the code that shells use; a run saves at Ctrl-C and ends with `INTERRUPTED`."""
