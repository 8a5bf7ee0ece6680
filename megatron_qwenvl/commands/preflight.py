"""PROGRAM=tools/preflight.py launch/srun.sh --recipe R [--section.field value ...] [--bad_nodes FILE] [--deadline S]

Can this run start here and work? Takes the trainer's arguments, runs one process per rank like the trainer, and checks
in under a minute: all ranks there; versions, devices and kernels equal; a matrix product right; the run directory
writable and shared, with room for the next checkpoints; data and start weights; the links between nodes and an
all-reduce. Also through launch/local.sh and launch/mpirun.sh, or as one process by itself.

  --directory DIR     in place of a recipe: look at the machines only, for a job that writes to this directory
  --bad_nodes FILE    write the names of bad nodes there, one a line; removed where there are none
  --deadline S        seconds that all ranks have to report (default 30); all of it takes at most twice as long
  --slow_nodes W      what a node is that computes or sends more than twice as slowly as the median: warning (default)
                      or failure

Exit codes: 0 passed; 1 the run cannot work, on whatever nodes; 2 arguments or configuration; 3 one or more nodes are
bad. torchrun (launch/local.sh) makes 1 of every failure.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_qwenvl.config.cli import HEAD_START_SECONDS, RunArguments, parse_start_arguments
from megatron_qwenvl.config.options import OptionParser
from megatron_qwenvl.config.schema import CheckpointConfig, RunConfig
from megatron_qwenvl.preflight.findings import Finding, bad_nodes, warning
from megatron_qwenvl.runtime.exit_codes import BAD_NODES, RUN_ERROR, USAGE_ERROR
from megatron_qwenvl.runtime.exit_process import exit_process
from megatron_qwenvl.runtime.processes import LaunchError, detect_process
from megatron_qwenvl.runtime.stop_signals import exit_on_stop_signals

if TYPE_CHECKING:
    from megatron_qwenvl.preflight.run import Checklist


def parse_own_arguments(argv: Sequence[str], quiet: bool = False) -> tuple[argparse.Namespace, list[str]]:
    """This tool's arguments, and those that it shares with the trainer.

    Raises:
        ArgumentError: a value that cannot be used.
    """
    parser = OptionParser(prog="preflight", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.quiet = quiet
    parser.add_argument("--directory")
    parser.add_argument("--bad_nodes", type=Path)
    deadline = parser.add_argument("--deadline", type=float, default=30.0)
    parser.add_argument("--slow_nodes", choices=("warning", "failure"), default="warning")
    arguments, shared = parser.parse_known_args(argv)
    if not 1 <= arguments.deadline <= 3600:
        raise argparse.ArgumentError(deadline, f"expected 1 to 3600 seconds, found {arguments.deadline}")
    return arguments, shared


def parse_arguments(
    argv: Sequence[str], world_size: int, quiet: bool
) -> tuple[argparse.Namespace, RunArguments]:
    """All arguments; exits with 2 and one message for bad ones, as `parse_start_arguments` does."""
    try:
        arguments, shared = parse_own_arguments(argv, quiet)
    except argparse.ArgumentError as error:
        if quiet:
            time.sleep(HEAD_START_SECONDS)
        else:
            print(f"preflight: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    if arguments.directory:
        config = RunConfig(run_dir=arguments.directory, checkpoint=CheckpointConfig(save=False))
        return arguments, RunArguments(config)
    description = __doc__ or ""
    return arguments, parse_start_arguments(shared, "preflight", description, world_size, quiet)


def write_bad_nodes(path: Path, names: Sequence[str]) -> None:
    """Replace the file, or remove it where there are none; says so where it cannot."""
    try:
        if names:
            from megatron_qwenvl.checkpoint.storage.writing import replace_bytes

            path.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(path, "".join(f"{name}\n" for name in names).encode())
        else:
            path.unlink(missing_ok=True)
    except OSError as error:  # often the very reason for which the checks will fail
        say(warning("bad nodes", f"{path}: cannot be written ({error.strerror})"))


def say(finding: Finding) -> None:
    print(finding.line(), flush=True)


def conclude(findings: Sequence[Finding], bad_nodes_file: Path | None, began: float) -> None:
    """The last line, and the file of bad nodes."""
    if bad_nodes_file:
        write_bad_nodes(bad_nodes_file, bad_nodes(findings))
    failures = [finding for finding in findings if finding.level == "failure"]
    if failures:
        node = f"{failures[0].node}: " if failures[0].node else ""
        print(f"preflight: FAILED: {failures[0].check}: {node}{failures[0].text}", flush=True)
    else:
        print(f"preflight: passed in {time.monotonic() - began:.1f} s", flush=True)


def make_checklist(arguments: argparse.Namespace, run: RunArguments) -> Checklist:
    """What is to be checked for a run, or for `--directory`."""
    from megatron_qwenvl.checkpoint.run.space import checkpoint_bytes, checkpoints_to_come
    from megatron_qwenvl.preflight.inputs import check_inputs, count_checkpoints, needed_paths
    from megatron_qwenvl.preflight.run import Checklist

    config = run.config
    run_dir = Path(config.run_dir)
    return Checklist(
        run_dir=run_dir,
        runtime=config.runtime,
        checkpoint_bytes=checkpoint_bytes(config) if config.checkpoint.save else 0,
        checkpoints=checkpoints_to_come(config, count_checkpoints(run_dir)),
        paths=() if arguments.directory else needed_paths(config),
        own_checks=lambda: [] if arguments.directory else check_inputs(run),
        deadline=arguments.deadline,
        slow=arguments.slow_nodes,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Make the checks; returns the exit code."""
    began = time.monotonic()
    try:
        process = detect_process()
    except LaunchError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return USAGE_ERROR
    argv = sys.argv[1:] if argv is None else argv
    arguments, run = parse_arguments(argv, process.world_size, quiet=process.rank > 0)
    if arguments.bad_nodes and process.rank == 0:
        write_bad_nodes(arguments.bad_nodes, [])  # those of an earlier job

    # Everything below needs torch; configuration errors are said before it is loaded.
    from megatron_qwenvl.preflight.exchange import RendezvousError
    from megatron_qwenvl.preflight.run import run_preflight
    from megatron_qwenvl.runtime.environment import describe_environment

    try:
        return run_preflight(
            process,
            describe_environment(process),
            make_checklist(arguments, run),
            say,
            lambda findings: conclude(findings, arguments.bad_nodes, began),
        ).code
    except RendezvousError as error:
        print(f"preflight: FAILED: {error}", file=sys.stderr)
        return BAD_NODES if process.rank else RUN_ERROR


def run() -> NoReturn:
    """Run the program and exit with its code."""
    exit_on_stop_signals("preflight")
    exit_process(main())  # a thread that hangs in a file system or a network must not hold up the end


if __name__ == "__main__":
    run()
