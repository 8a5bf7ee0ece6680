"""Train one stage of Qwen-VL.

    torchrun --nproc-per-node 4 -m megatron_qwenvl.train --recipe tiny_stage1 --parallel.tensor 2

`--print_config` shows the resolved configuration, `--help` explains every field. A run that has a checkpoint in
its `run_dir` goes on from the newest good one, with `--from_step N` from that of step N. SIGUSR1, SIGTERM or Ctrl-C:
all ranks finish the same step, save and end with exit code 75; started again the run goes on from there.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from typing import NoReturn

from megatron_qwenvl.runtime.exit_codes import CRASHED, INTERRUPTED, RUN_ERROR, SUCCESS, USAGE_ERROR
from megatron_qwenvl.runtime.exit_process import exit_process
from megatron_qwenvl.runtime.stop_signals import StopRequest

logger = logging.getLogger(__name__)

PEER_SECONDS = 5.0
"""A rank that lost a neighbour waits before it ends, so that the launcher sees the neighbour's end first."""
START_SECONDS = 10.0
"""A start that was asked to stop ends by itself after this time; Slurm's KillWait, after which it kills, is 30 s."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, start, train, stop; returns the exit code, with which the process is to `leave`."""
    stop = StopRequest.listen()  # before anything is imported that takes time
    try:
        return _run(sys.argv[1:] if argv is None else argv, stop)
    except SystemExit as end:  # after --help and --print_config, or for arguments that cannot be used
        if not end.code and stop.received():
            return _stopped_early(stop.name)
        return int(end.code or 0)
    except Exception as error:  # before the log is set up, or of the log itself
        return _crashed(error)


def _run(argv: Sequence[str], stop: StopRequest) -> int:
    from megatron_qwenvl.config.cli import parse_start_arguments
    from megatron_qwenvl.runtime.processes import LaunchError, detect_process

    try:
        process = detect_process()
    except LaunchError as error:
        print(f"train: {error}", file=sys.stderr)
        return USAGE_ERROR
    arguments = parse_start_arguments(
        argv,
        prog="python -m megatron_qwenvl.train",
        description="Train one stage of Qwen-VL.",
        world_size=process.world_size,
        quiet=process.rank > 0,
    )
    config = arguments.config
    stop.limit_start(START_SECONDS, lambda name: exit_process(_stopped_early(name)))
    if stop.received():
        return _stopped_early(stop.name)

    # Everything below needs torch; configuration errors are said before it is loaded.
    warnings.filterwarnings(
        "ignore", module=r"megatron\.core"
    )  # what it says on import of kernels that are absent
    from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
    from megatron_qwenvl.data.errors import DataError
    from megatron_qwenvl.engine.backends import LayerBackendError
    from megatron_qwenvl.engine.start import is_lost_peer, start_engine, stop_engine
    from megatron_qwenvl.engine.versions import EngineVersionError
    from megatron_qwenvl.runtime.logs import configure_logging
    from megatron_qwenvl.training.errors import TrainingError
    from megatron_qwenvl.training.loop import Trainer

    configure_logging(process.rank)
    try:
        if stop.received():
            return _stopped_early(stop.name)
        runtime = start_engine(config, process)
        trainer = Trainer.build(config, runtime, stop, arguments.from_step)
        progress = trainer.run()
        if runtime.is_rank0:
            how = "interrupted" if trainer.interrupted else "finished"
            logger.info("%s at step %d of %d", how, progress.step, config.train.steps)
        stop_engine()
        return INTERRUPTED if trainer.interrupted else SUCCESS
    except (
        CheckpointError,
        DataError,
        EngineVersionError,
        LayerBackendError,
        LaunchError,
        TrainingError,
    ) as error:
        logger.error("FAILED (error) %s: %s", type(error).__name__, error)
        return RUN_ERROR
    except Exception as error:
        if stop.received_before_start and is_lost_peer(error):  # which got the signal, too, and was faster
            return _stopped_early(stop.name)
        if is_lost_peer(error):
            logger.error("FAILED (lost peer) %s", " ".join(str(error).split()))
            time.sleep(PEER_SECONDS)
        else:
            return _crashed(error)
        return CRASHED


def _crashed(error: Exception) -> int:
    logger.exception("FAILED (crash) %s: %s", type(error).__name__, " ".join(str(error).split()))
    return CRASHED


def _stopped_early(signal_name: str) -> int:
    print(f"train: stopped by {signal_name} before the first step: nothing to save", file=sys.stderr)
    return INTERRUPTED


def run() -> NoReturn:
    """Run the program and end the process with its code."""
    exit_process(main())


if __name__ == "__main__":
    run()
