"""python tools/show_step.py --run RUN --step K [--data_parallel N] [--json] [--section.field value ...]

Prints what a training step holds: the packs of every data-parallel rank and micro-batch, and their samples. Only
indices are read. Steps count from 0, as in metrics.jsonl.

  --run RUN      a run's directory: any step that it has made or will make, over all changes of its data that its
                 newest checkpoint records
  --recipe R     in place of a run: what a run of this recipe would begin with
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_qwenvl.config.load import ConfigError, load_config
from megatron_qwenvl.config.options import OptionParser
from megatron_qwenvl.runtime.console import escape_undecodable_names
from megatron_qwenvl.runtime.exit_codes import RUN_ERROR, SUCCESS, USAGE_ERROR

from .entry import run_program

if TYPE_CHECKING:
    from megatron_qwenvl.data.sampling.sampler import StepSampler


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; returns the options and the configuration overrides."""
    parser = OptionParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--run", type=Path, help="a run's directory")
    subject.add_argument("--recipe", help="name of a recipe, or a YAML file")
    parser.add_argument("--step", required=True, type=int, help="number of the step, from 0")
    parser.add_argument("--data_parallel", type=int, default=1, metavar="N", help="data-parallel size")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.step < 0 or arguments.data_parallel < 1:
        parser.error("expected --step 0 or more and --data_parallel 1 or more")
    return arguments, overrides


def open_sampler(arguments: argparse.Namespace, overrides: list[str]) -> StepSampler:
    """The sampler of a run or of a recipe.

    Raises:
        ConfigError, DataError, CheckpointError: it cannot be made.
    """
    from megatron_qwenvl.checkpoint.run.start import find_start
    from megatron_qwenvl.data.rendering.tokenizer import load_decoder_tokenizer
    from megatron_qwenvl.data.sampling.resume import resume_data
    from megatron_qwenvl.data.sampling.sampler import open_training_sampler, training_sampler
    from megatron_qwenvl.data.sampling.sources import open_training_sources

    if arguments.run is None:
        config = load_config(arguments.recipe, overrides)
        return open_training_sampler(config, load_decoder_tokenizer(config).fingerprint)
    own = ["--run_dir", str(arguments.run), "--checkpoint.init_from", "null"]
    config = load_config(str(arguments.run / "config.yaml"), [*own, *overrides])
    sources = open_training_sources(config, load_decoder_tokenizer(config).fingerprint)
    start = find_start(config)
    if start.checkpoint is None or start.manifest is None:
        return training_sampler(config, sources)
    data = resume_data(config, sources, start.checkpoint, start.manifest.step)
    for line in data.lines:
        print(f"if started now: {line}", file=sys.stderr)
    return training_sampler(config, sources, data.history)


def print_step(described: dict[str, Any]) -> None:
    """Print a line for each pack and, below it, a line for each sample."""
    packs = described["packs"]
    print(
        f"step {described['step']}: {sum(len(pack['samples']) for pack in packs)} samples in {len(packs)} "
        f"micro-batches, {sum(pack['tokens'] for pack in packs)} tokens, {sum(p['images'] for p in packs)} images"
    )
    for pack in packs:
        print(
            f"  rank {pack['dp_rank']} micro-batch {pack['micro_batch']}: {len(pack['samples'])} samples, "
            f"{pack['tokens']} tokens, {pack['images']} images"
        )
        for sample in pack["samples"]:
            print(
                f"    {sample['task']:16} {sample['tokens']:5} tokens {sample['images']} images  {sample['key']}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the step; returns the exit code."""
    arguments, overrides = parse_arguments(argv)
    from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
    from megatron_qwenvl.data.errors import DataError
    from megatron_qwenvl.data.sampling.step_description import describe_step

    escape_undecodable_names()
    try:
        described = describe_step(open_sampler(arguments, overrides), arguments.step, arguments.data_parallel)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except (DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return RUN_ERROR
    if arguments.json:
        print(json.dumps(described))
    else:
        print_step(described)
    return SUCCESS


def run() -> NoReturn:
    """Run the program and exit with its code."""
    run_program("show_step", main)


if __name__ == "__main__":
    run()
