"""Train one stage of Qwen-VL.

    torchrun --nproc-per-node 4 -m megatron_qwenvl.train --recipe tiny_stage1 --parallel.tensor 2

`--print-config` shows the resolved configuration, `--help` explains every field. A run that has a checkpoint in
its `run_dir` goes on from the newest good one.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from megatron_qwenvl.config.cli import USAGE_ERROR, parse_run_arguments
from megatron_qwenvl.runtime.processes import LaunchError, detect_process

logger = logging.getLogger(__name__)

RUN_ERROR = 1
"""Exit code of a run that stopped for a reason that its last log line names."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, start, train, stop; returns the exit code."""
    try:
        process = detect_process()
    except LaunchError as error:
        print(f"train: {error}", file=sys.stderr)
        return USAGE_ERROR
    config = parse_run_arguments(
        sys.argv[1:] if argv is None else argv,
        prog="python -m megatron_qwenvl.train",
        description="Train one stage of Qwen-VL.",
        world_size=process.world_size,
        quiet=process.rank > 0,
    )

    # Everything below needs torch; configuration errors are said before it is loaded.
    warnings.filterwarnings(
        "ignore", module=r"megatron\.core"
    )  # what it says on import of kernels that are absent
    from megatron_qwenvl.checkpoint.files import CheckpointError
    from megatron_qwenvl.data.errors import DataError
    from megatron_qwenvl.runtime import engine
    from megatron_qwenvl.runtime.engine_on_cpu import EngineVersionError
    from megatron_qwenvl.runtime.kernels import KernelError
    from megatron_qwenvl.training.errors import TrainingError
    from megatron_qwenvl.training.loop import Trainer

    engine.configure_logging(process.rank)
    try:
        runtime = engine.start(config, process)
        progress = Trainer.build(config, runtime).run()
        if runtime.is_main:
            logger.info("finished at step %d of %d", progress.step, config.train.steps)
        engine.stop()
    except (CheckpointError, DataError, EngineVersionError, KernelError, LaunchError, TrainingError) as error:
        logger.error("%s: %s", type(error).__name__, error)
        sys.stderr.flush()
        # Other ranks may wait in a collective: leave without the handshake that would wait for them.
        os._exit(RUN_ERROR)
    except Exception:
        logger.exception("rank %d stops", process.rank)
        sys.stderr.flush()
        os._exit(RUN_ERROR)
    return 0


if __name__ == "__main__":
    sys.exit(main())
