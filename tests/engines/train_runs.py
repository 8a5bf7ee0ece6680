"""Train a list of small runs under the megatron-core of this interpreter.

    python -m tests.engines.train_runs runs.json

Each entry of the file names the folder of the data, a run directory, the step to stop after, the number of ranks and
overrides of the configuration. A run that has a checkpoint is resumed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_qwenvl.engine.versions import installed_version
from tests.distributed.harness import run_ranks
from tests.end_to_end.training_cases import run_config, train


def main(path: str) -> None:
    for run in json.loads(Path(path).read_text()):
        overrides = (*run["overrides"], "--train.stop_after", str(run["stop_after"]))
        config = run_config(Path(run["data"]), Path(run["run_dir"]), *overrides, world=run["ranks"])
        run_ranks(run["ranks"], train, config, timeout=500)
    print(installed_version())


if __name__ == "__main__":
    main(sys.argv[1])
