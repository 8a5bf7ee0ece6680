"""python tools/index_shards.py DIR... [--tokenizer FILE] [--workers N] [--verify_images] [--force]
           [--unparsed_markup leave_out|keep] [--ref_blank outside|inside]

Writes the index of every WebDataset shard (`*.tar`) of the directories, and their manifests. Shards whose index is
current are left alone. Runs in N processes, or over all ranks when started by mpirun or srun (needs mpi4py); under
torchrun rank 0 alone works, in N processes.
`--check` reads every shard and compares its digest instead, `--list_skipped` prints shard, key and reason of every
sample that the indices leave out, and the shards that could not be indexed. `--unparsed_markup` and `--ref_blank`
(docs/samples.md) are kept in the index: they hold for every run over the directory, and when it is indexed again
without them. Exits with 1 when a shard could not be indexed; the others are indexed all the same.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_qwenvl.config.options import OptionParser
from megatron_qwenvl.runtime.console import escape_undecodable_names
from megatron_qwenvl.runtime.exit_codes import RUN_ERROR, SUCCESS, USAGE_ERROR

from .entry import run_program


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="directory of *.tar shards")
    parser.add_argument(
        "--tokenizer", help="qwen.tiktoken or tokenizer.json; left out: the byte-level vocabulary"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (without MPI)")
    parser.add_argument(
        "--verify_images", action="store_true", help="decode every image, not its header only"
    )
    parser.add_argument("--force", action="store_true", help="index again what is current")
    parser.add_argument(
        "--unparsed_markup",
        choices=("leave_out", "keep"),
        help="dialogues with grounding markup that does not parse; first: leave_out",
    )
    parser.add_argument(
        "--ref_blank",
        choices=("outside", "inside"),
        help="where the blank before a phrase of a grounded caption stands; first: outside",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare the digests of all shards; write nothing")
    mode.add_argument(
        "--list_skipped",
        action="store_true",
        help="print every sample that the indices leave out; write nothing",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Index, check or list; returns the exit code."""
    arguments = parse_arguments(argv)
    from megatron_qwenvl.data.errors import DataError
    from megatron_qwenvl.runtime.processes import LaunchError

    from .indexing import check_directory, index_directories, list_skipped

    escape_undecodable_names()
    try:
        if arguments.list_skipped:
            return RUN_ERROR if sum(map(list_skipped, arguments.directories)) else SUCCESS
        if arguments.check:
            for directory in arguments.directories:
                check_directory(directory, arguments.tokenizer)
            return SUCCESS
        return RUN_ERROR if index_directories(arguments) else SUCCESS
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return RUN_ERROR
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR


def run() -> NoReturn:
    """Run the program and exit with its code."""
    run_program("index_shards", main)


if __name__ == "__main__":
    run()
