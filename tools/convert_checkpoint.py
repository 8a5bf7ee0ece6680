"""Checkpoints from stage to stage, and what is in them.

    python tools/convert_checkpoint.py next-stage --from runs/stage1 --to stage2 --out weights/stage2_start

Exit codes: 0 done, 1 refused or failed (one line says why), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_qwenvl.checkpoint.files import CheckpointError
from megatron_qwenvl.checkpoint.progress import Progress
from megatron_qwenvl.checkpoint.transition import carry_out, plan_transition


def next_stage(arguments: argparse.Namespace) -> int:
    """Make the start of the next stage from a finished one."""
    transition = plan_transition(arguments.source, arguments.to, arguments.force)
    for note in transition.notes:
        print(note)
    return _convert(
        arguments, transition.manifest.total_bytes, lambda add: carry_out(transition, arguments.out, add)
    )


def _convert(arguments: argparse.Namespace, total: int, work: Callable[[Callable[[int], None]], None]) -> int:
    if arguments.out.exists():
        raise CheckpointError(f"{arguments.out}: exists already; choose another name or remove it")
    if arguments.dry_run:
        print(f"would write {total / 1e9:.2f} GB to {arguments.out}")
        return 0
    progress = Progress(f"{arguments.command} -> {arguments.out}", total)
    work(progress.add)
    progress.finish()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("next-stage", help="weights of a finished stage as the start of the next")
    command.add_argument(
        "--from", dest="source", type=Path, required=True, help="checkpoint or run directory"
    )
    command.add_argument("--to", choices=("stage2", "stage3"), required=True, help="stage to start")
    command.add_argument("--force", action="store_true", help="accept weights of any stage")
    _add_output(command)
    command.set_defaults(run=next_stage)
    return parser


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, help="directory to create")
    command.add_argument("--dry-run", action="store_true", help="check everything, write nothing")


def main() -> int:
    """Run one command."""
    arguments = _parser().parse_args()
    try:
        return arguments.run(arguments)
    except (CheckpointError, OSError) as error:
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
