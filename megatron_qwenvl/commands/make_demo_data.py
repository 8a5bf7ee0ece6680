"""python tools/make_demo_data.py --out DIR [--train N] [--held_out N] [--seed S]

Draws images of coloured shapes and digits and writes them as WebDataset shards with records of all seven tasks and
ChatML dialogues, in English and Chinese: training data in DIR/<source>, held-out data in DIR/val and DIR/test. Equal
arguments give equal files. The shards are not indexed yet: see tools/index_shards.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from megatron_qwenvl.config.options import OptionParser
from megatron_qwenvl.runtime.exit_codes import RUN_ERROR, SUCCESS

from .entry import run_program


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write to")
    parser.add_argument("--train", type=_count, default=30_000, metavar="N", help="training samples in all")
    parser.add_argument(
        "--held_out", type=_count, default=320, metavar="N", help="samples of every validation and test part"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of everything that is drawn")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    """Parse a number of samples, large enough for every source to get some."""
    if not text.isdecimal() or int(text) < 100:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 100, found {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write all shards; returns the exit code."""
    arguments = parse_arguments(argv)
    if find_spec("webdataset") is None:
        print(
            "make_demo_data: expected the package webdataset, found none: pip install webdataset",
            file=sys.stderr,
        )
        return RUN_ERROR
    from megatron_qwenvl.demo.dataset import make_demo_data

    try:
        make_demo_data(
            arguments.out,
            arguments.train,
            arguments.held_out,
            arguments.seed,
            on_subset=lambda subset, count: print(f"{arguments.out / subset}: {count} samples", flush=True),
        )
    except OSError as error:
        print(f"{arguments.out}: cannot write the data: {error.strerror or error}", file=sys.stderr)
        return RUN_ERROR
    return SUCCESS


def run() -> NoReturn:
    """Run the program and exit with its code."""
    run_program("make_demo_data", main)


if __name__ == "__main__":
    run()
