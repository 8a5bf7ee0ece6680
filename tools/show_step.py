"""python tools/show_step.py --recipe R --step K [--data-parallel N] [--json] [--section.field value ...]

Prints what a training step holds: the packs of every data-parallel rank and micro-batch, and their samples. Only
indices are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from megatron_qwenvl.config.load import ConfigError, load_config
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.plan import describe_step, training_plan
from megatron_qwenvl.data.tokenizer import load_tokenizer


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line and the configuration overrides in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", required=True, help="name of a recipe, or a YAML file")
    parser.add_argument("--step", required=True, type=int, help="number of the step, from 0")
    parser.add_argument("--data-parallel", type=int, default=1, metavar="N", help="data-parallel size")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments, overrides = parser.parse_known_args()
    if arguments.step < 0 or arguments.data_parallel < 1:
        parser.error("expected --step 0 or more and --data-parallel 1 or more")
    return arguments, overrides


def print_step(described: dict[str, Any]) -> None:
    """The human form: a line a pack, and below it a line a sample."""
    packs = described["packs"]
    print(
        f"step {described['step']}: {sum(len(pack['samples']) for pack in packs)} samples in {len(packs)} "
        f"micro-batches, {sum(pack['tokens'] for pack in packs)} tokens, {sum(p['images'] for p in packs)} pictures"
    )
    for pack in packs:
        print(
            f"  rank {pack['dp_rank']} micro-batch {pack['micro_batch']}: {len(pack['samples'])} samples, "
            f"{pack['tokens']} tokens, {pack['images']} pictures"
        )
        for sample in pack["samples"]:
            print(
                f"    {sample['task']:16} {sample['tokens']:5} tokens {sample['images']} pictures  {sample['key']}"
            )


def main() -> int:
    arguments, overrides = parse_arguments()
    try:
        config = load_config(arguments.recipe, overrides)
        plan = training_plan(config, load_tokenizer(config.data.tokenizer).fingerprint)
        described = describe_step(plan, arguments.step, arguments.data_parallel)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(described))
    else:
        print_step(described)
    return 0


if __name__ == "__main__":
    sys.exit(main())
