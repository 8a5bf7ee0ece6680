"""Train one training stage of Qwen-VL.

    torchrun --nproc-per-node 4 -m megatron_qwenvl.train --recipe tiny_stage1 --parallel.tensor 2

`--print_config` shows the resolved configuration, `--help` explains every field. A run with checkpoints in its
`run_dir` resumes from the newest undamaged one, or with `--from_step N` from that of step N. On SIGUSR1, SIGTERM or
Ctrl-C, all ranks finish the same step, save and exit with code 75; the same command resumes the run.
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
"""Delay of the exit after a lost connection, so that the launcher notices the failed rank first."""
START_SECONDS = 10.0
"""Time limit of a start after a stop signal. Slurm kills after KillWait, 30 s by default."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, start the engine, train and stop; returns the exit code for `exit_process`."""
    stop = StopRequest.listen()  # before any slow import
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
        description="Train one training stage of Qwen-VL.",
        world_size=process.world_size,
        quiet=process.rank > 0,
    )
    config = arguments.config
    stop.limit_start(START_SECONDS, lambda name: exit_process(_stopped_early(name)))
    if stop.received():
        return _stopped_early(stop.name)

    # Everything below needs torch; configuration errors are reported before it is imported.
    warnings.filterwarnings(
        "ignore", module=r"megatron\.core"
    )  # what it says on import of kernels that are absent
    # What megatron-core still calls of torch.distributed under an old name.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
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
        if stop.received_before_start and is_lost_peer(
            error
        ):  # the other rank got the signal, too, and ended first
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
