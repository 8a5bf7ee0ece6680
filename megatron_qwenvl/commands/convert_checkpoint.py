"""Checkpoints from one training stage to the next, weights in and out of published formats, contents of checkpoints.

    python tools/convert_checkpoint.py next-stage --from runs/stage1 --to stage2 --out weights/stage2_start
    python tools/convert_checkpoint.py import-parts --vit CLIP-ViT-bigG-14 --llm Qwen-7B --out weights/stage1_start
    python tools/convert_checkpoint.py import-parts --vit CLIP-ViT-bigG-14 --llm Qwen2.5-7B \\
        --recipe qwen2_5_7b_stage1 --out weights/stage1_start
    python tools/convert_checkpoint.py import-qwenvl --from Qwen-VL-Chat --out weights/qwen_vl_chat
    python tools/convert_checkpoint.py export-qwenvl --from runs/stage3 --out Qwen-VL-mine --tokenizer Qwen-VL
    python tools/convert_checkpoint.py inspect runs/stage2
    python tools/convert_checkpoint.py compare runs/stage3 Qwen-VL-mine
    python tools/convert_checkpoint.py verify runs/stage2

A checkpoint is named by its own directory, a run's checkpoints folder or a run's directory.
Exit codes: 0 done; 1 refused, failed, damaged or different (the reason is printed); 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_qwenvl.config.load import ConfigError
from megatron_qwenvl.config.options import OptionParser
from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.runtime.console import escape_undecodable_names
from megatron_qwenvl.runtime.exit_codes import RUN_ERROR, USAGE_ERROR

from .entry import run_program

DRY_RUN = (
    "write nothing; check what shows without reading the weights: configuration, sizes of files, names, types and "
    "shapes of all tensors (not their values, and not digests: see verify)"
)


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("next-stage", help="weights of a finished stage as the start of the next")
    _add_source(command, "checkpoint or run directory")
    command.add_argument("--to", choices=("stage2", "stage3"), required=True, help="stage to start")
    command.add_argument(
        "--force", action="store_true", help="accept weights of any stage and of unfinished runs"
    )
    _add_output(command)

    command = commands.add_parser("import-parts", help="OpenCLIP ViT, a language model and a new adapter")
    command.add_argument("--vit", type=Path, required=True, help="OpenCLIP weights, file or directory")
    command.add_argument(
        "--llm", type=Path, required=True, help="Hugging Face directory of the language model"
    )
    command.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        default="stage1",
        help=f"gives the model's shape: a YAML file or one of {', '.join(RECIPES)}",
    )
    command.add_argument("--seed", type=int, default=1234, help="seed of the adapter")
    _add_output(command)

    command = commands.add_parser("import-qwenvl", help="a published Qwen-VL or Qwen-VL-Chat directory")
    _add_source(command, "published directory")
    command.add_argument(
        "--accept_drift",
        action="store_true",
        help="take a model whose constant position table was trained, as the published fine-tuning does; the table is "
        "the constant one again",
    )
    _add_output(command)

    command = commands.add_parser("export-qwenvl", help="the published layout from a checkpoint")
    _add_source(command, "checkpoint or run directory")
    command.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer file, or published directory whose tokenizer and code files are copied along",
    )
    _add_output(command)

    command = commands.add_parser("inspect", help="what a checkpoint is")
    command.add_argument("checkpoint", type=Path)

    command = commands.add_parser(
        "compare", help="tensors in which two checkpoints or published directories differ"
    )
    command.add_argument("a", type=Path)
    command.add_argument("b", type=Path)
    command.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference that counts as equal"
    )

    command = commands.add_parser("verify", help="whether a checkpoint is whole")
    command.add_argument("checkpoint", type=Path)
    return parser


def _add_source(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--from", dest="source", type=Path, required=True, help=what)


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, help="directory to create")
    command.add_argument("--dry_run", action="store_true", help=DRY_RUN)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    # torch's memory in huge pages: tensors are read into fresh memory, whose small pages cost more than the reading.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from megatron_qwenvl.checkpoint.storage.errors import CheckpointError

    from .conversions import COMMANDS

    escape_undecodable_names()
    try:
        return COMMANDS[arguments.command](arguments)
    except ConfigError as error:
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except (CheckpointError, OSError) as error:
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return RUN_ERROR


def run() -> NoReturn:
    """Run the program and exit with its code."""
    run_program("convert_checkpoint", main)


if __name__ == "__main__":
    run()
