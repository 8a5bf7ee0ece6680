"""The same as the console script `qwenvl-progress`: see megatron_qwenvl/commands/run_progress.py.

Runs with Python alone, where nothing is installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_qwenvl.commands.run_progress import run

if __name__ == "__main__":
    run()
