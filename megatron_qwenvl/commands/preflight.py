"""PROGRAM=tools/preflight.py launch/srun.sh --recipe R [--section.field value ...] [--bad_nodes FILE] [--deadline S]

Check in under a minute that a run can start on these nodes. Takes the trainer's arguments and runs one process per
rank like the trainer. Checks that all ranks are present; that versions, devices and kernels are equal; a matrix
product; that the run directory is writable and shared, with space for the next checkpoints; data and start weights;
the links between nodes and an all-reduce. Also runs through launch/local.sh and launch/mpirun.sh, or as one process.

Exit codes: 0 passed; 1 the run cannot work on any nodes; 2 wrong arguments or configuration; 3 one or more nodes are
bad; 70 an unexpected error. launch/local.sh ends with the code of the rank that failed first.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_qwenvl.config.cli import HEAD_START_SECONDS, RunArguments, parse_start_arguments
from megatron_qwenvl.config.options import OptionParser
from megatron_qwenvl.config.schema import CheckpointConfig, RunConfig
from megatron_qwenvl.preflight.rules import Finding, warning
from megatron_qwenvl.runtime.exit_codes import BAD_NODES, CRASHED, RUN_ERROR, USAGE_ERROR
from megatron_qwenvl.runtime.exit_process import exit_process
from megatron_qwenvl.runtime.processes import LaunchError, detect_process
from megatron_qwenvl.runtime.stop_signals import exit_on_stop_signals

if TYPE_CHECKING:
    from megatron_qwenvl.preflight.run import Checklist


def own_options() -> OptionParser:
    """Make the parser of the options that the trainer does not have."""
    parser = OptionParser(prog="preflight", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.usage = "[--directory DIR] [--bad_nodes FILE] [--deadline S] [--slow_nodes warning|failure]"
    parser.add_argument(
        "--directory",
        metavar="DIR",
        help="in place of a recipe: check the machines only, for a job that writes to this directory",
    )
    parser.add_argument(
        "--bad_nodes",
        type=Path,
        metavar="FILE",
        help="write the names of bad nodes to this file, one per line; without bad nodes the file is removed",
    )
    parser.add_argument(
        "--deadline",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds for all ranks to report (default 30); all checks take at most twice as long",
    )
    parser.add_argument(
        "--slow_nodes",
        choices=("warning", "failure"),
        default="warning",
        help="level of a node whose computation or links are more than twice as slow as the median (default warning)",
    )
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"expected 1 to 3600 seconds, found {text}")
    return seconds


def parse_own_arguments(argv: Sequence[str], quiet: bool = False) -> tuple[argparse.Namespace, list[str]]:
    """Parse the arguments of preflight alone; returns them and the remaining ones, which are the trainer's.

    Raises:
        ArgumentError: an invalid value.
    """
    parser = own_options()
    parser.quiet = quiet
    return parser.parse_known_args(argv)


def parse_arguments(
    argv: Sequence[str], world_size: int, quiet: bool
) -> tuple[argparse.Namespace, RunArguments]:
    """Parse all arguments; exits with 2 and one message for invalid ones, as `parse_start_arguments` does."""
    try:
        arguments, shared = parse_own_arguments(argv, quiet)
    except argparse.ArgumentError as error:
        if quiet:
            time.sleep(HEAD_START_SECONDS)
        else:
            print(f"preflight: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    if arguments.directory and not {"-h", "--help"} & set(shared):
        config = RunConfig(run_dir=arguments.directory, checkpoint=CheckpointConfig(save=False))
        return arguments, RunArguments(config)
    description = __doc__ or ""
    return arguments, parse_start_arguments(
        shared, "preflight", description, world_size, quiet, own_options()
    )


def write_bad_nodes(path: Path, names: Sequence[str]) -> None:
    """Write the file of bad nodes, or remove it if there are none; a failure to do so is printed as a warning."""
    try:
        if names:
            from megatron_qwenvl.checkpoint.storage.writing import replace_bytes

            path.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(path, "".join(f"{name}\n" for name in names).encode())
        else:
            path.unlink(missing_ok=True)
    except OSError as error:  # often the reason why the checks will fail
        print_finding(warning("bad nodes", f"{path}: cannot be written ({error.strerror})"))


def print_finding(finding: Finding) -> None:
    print(finding.line(), flush=True)


def report_result(findings: Sequence[Finding], bad_nodes_file: Path | None, began: float) -> None:
    """Write the file of bad nodes and print the last line."""
    from megatron_qwenvl.preflight.verdict import bad_nodes

    if bad_nodes_file:
        write_bad_nodes(bad_nodes_file, bad_nodes(findings))
    failures = [finding for finding in findings if finding.level == "failure"]
    if failures:
        node = f"{failures[0].node}: " if failures[0].node else ""
        print(f"preflight: FAILED: {failures[0].check}: {node}{failures[0].text}", flush=True)
    else:
        print(f"preflight: passed in {time.monotonic() - began:.1f} s", flush=True)


def make_checklist(arguments: argparse.Namespace, run: RunArguments) -> Checklist:
    """Make the checklist of a run, or of `--directory`."""
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
        rank0_checks=lambda: [] if arguments.directory else check_inputs(run),
        deadline=arguments.deadline,
        slow=arguments.slow_nodes,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Perform the checks; returns the exit code."""
    began = time.monotonic()
    try:
        process = detect_process()
    except LaunchError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return USAGE_ERROR
    argv = sys.argv[1:] if argv is None else argv
    arguments, run = parse_arguments(argv, process.world_size, quiet=process.rank > 0)
    if arguments.bad_nodes and process.rank == 0:
        write_bad_nodes(arguments.bad_nodes, [])  # removes the file of an earlier job

    # Everything below needs torch; configuration errors are reported before it is imported.
    from megatron_qwenvl.preflight.exchange import RendezvousError
    from megatron_qwenvl.preflight.run import run_preflight
    from megatron_qwenvl.runtime.environment import describe_environment

    try:
        return run_preflight(
            process,
            describe_environment(process),
            make_checklist(arguments, run),
            print_finding,
            lambda findings: report_result(findings, arguments.bad_nodes, began),
        ).code
    except RendezvousError as error:
        print(f"preflight: FAILED: {error}", file=sys.stderr)
        return BAD_NODES if process.rank else RUN_ERROR


def run() -> NoReturn:
    """Run the program and exit with its code."""
    exit_on_stop_signals("preflight")
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = CRASHED
    exit_process(code)  # does not wait for a thread that hangs in a file system or a network


if __name__ == "__main__":
    run()
