"""Command-line arguments of a run, shared by the trainer and the tools.

Imports neither torch nor megatron-core, so that `--help` and configuration errors are printed at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_qwenvl.runtime.exit_codes import SUCCESS, USAGE_ERROR

from .fields import (
    describe_default,
    describe_type,
    is_section,
    leaf_paths,
    nearest,
    plain,
    section_paths,
    walk_fields,
)
from .load import ConfigError, dump_yaml, load_config
from .options import OptionParser, current_spelling
from .recipes import RECIPES
from .schema import RunConfig, SourceConfig

_OWN_OPTIONS = {"--recipe", "--print_config", "--print_value", "--help"}
HEAD_START_SECONDS = 1.0
"""Delay of the exit of silent ranks: launchers end all processes once one has ended, and rank 0 must print first."""


@dataclass(frozen=True)
class RunArguments:
    """Parsed command line of a run."""

    config: RunConfig
    """The resolved configuration."""
    from_step: int | None = None
    """Resume from the run's checkpoint of this step; None: from its newest one."""


def parse_start_arguments(
    argv: Sequence[str],
    prog: str,
    description: str,
    world_size: int | None = None,
    quiet: bool = False,
    own: OptionParser | None = None,
) -> RunArguments:
    """Parse `--recipe NAME|FILE.yaml [--from_step N] [--print_config] [--print_value FIELD] [--help] [--section.field
    value ...]`.

    Exits with 0 after `--help`, `--print_config` or `--print_value`, with 2 and a message on standard error for
    invalid input.

    Args:
        argv: arguments without the program's name.
        prog: name of the program in the usage line.
        description: description of the program in `--help`.
        world_size: number of processes, checked against the parallel layout if given. `--print_config` and
            `--print_value` start no run and do not check it.
        quiet: print no error message; for all ranks of a run except rank 0.
        own: options of the program that the trainer does not have, for `--help`.
    """
    parser = _make_parser(prog, description, own)
    parser.quiet = quiet
    options, overrides = parser.parse_known_args(list(_with_values(argv)))
    if options.help:
        _print_and_exit(parser.format_help() + "\n" + describe_fields())
    if options.recipe is None:
        parser.error("the following arguments are required: --recipe")
    try:
        runs = not options.print_config and options.print_value is None
        config = load_config(options.recipe, overrides, world_size if runs else None)
        value = None if options.print_value is None else show_value(config, options.print_value)
    except ConfigError as error:
        if quiet:
            time.sleep(HEAD_START_SECONDS)
        parser.exit(USAGE_ERROR, None if quiet else f"{prog}: {error}\n")
    if value is not None:
        _print_and_exit(value + "\n")
    if options.print_config:
        _print_and_exit(dump_yaml(config))
    return RunArguments(config, options.from_step)


def _with_values(argv: Sequence[str]) -> Iterator[str]:
    """Join every override and its value to one argument, so that `--name -h` does not print the help."""
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        own = current_spelling(argument) in _OWN_OPTIONS
        overrides = argument.startswith("--") and "=" not in argument and not own
        if overrides and rest and not rest[0].startswith("--"):
            argument = f"{argument}={rest.pop(0)}"
        yield argument


def show_value(config: RunConfig, path: str) -> str:
    """Format one resolved value for scripts: text as it is, without quotes; other values as JSON in one line.

    Raises:
        ConfigError: `path` is neither a field nor a section.
    """
    if path not in leaf_paths() and path not in section_paths():
        raise ConfigError(f"--print_value {path}: unknown key{nearest(path, leaf_paths())}")
    value: Any = plain(config)
    for name in path.split("."):
        value = value[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def describe_fields() -> str:
    """Describe every field of the schema with its type, default and meaning."""
    title = "fields (defaults are the schema's; --print_config shows a recipe's values):"
    source = [f"a source of data.sources and data.validation_sources: {SourceConfig.__doc__}"]
    for name, field in walk_fields(SourceConfig):
        source += _describe(name, describe_type(field.annotation), describe_default(field), field.description)
    return "\n".join([title, "", *_describe_run_fields(), "", *source, ""])


def _describe_run_fields() -> Iterator[str]:
    for path, field in walk_fields(RunConfig):
        if is_section(field):
            yield f"\n{path}: {field.annotation.__doc__}"
        else:
            yield from _describe(
                f"--{path}", describe_type(field.annotation), describe_default(field), field.description
            )


def _describe(name: str, kind: str, default: str, meaning: str | None) -> list[str]:
    text = " ".join((meaning or "").replace("`", "").split())
    return [
        f"  {name}  {kind}  (default {default})",
        *textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      "),
    ]


def _make_parser(prog: str, description: str, own: OptionParser | None) -> OptionParser:
    usage = f"{prog} --recipe NAME|FILE.yaml [--from_step N] [--print_config] [--print_value FIELD] "
    usage += "[--section.field value ...]"
    parser = OptionParser(
        prog=prog,
        description=description,
        usage=f"{usage}\n       {own.usage}" if own else usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[own] if own else [],
        add_help=False,  # printed by `_print_and_exit`, with every field
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", metavar="NAME|FILE", help=f"a YAML file or one of {', '.join(RECIPES)}")
    parser.add_argument(
        "--from_step",
        type=_step,
        metavar="N",
        help="resume from the run's checkpoint of step N; newer ones are moved away, not deleted",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved configuration and exit"
    )
    parser.add_argument(
        "--print_value",
        metavar="FIELD",
        help="print one resolved value, such as run_dir, and exit; for scripts",
    )
    parser.add_argument("-h", "--help", action="store_true", help="explain every field and exit")
    return parser


def _step(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected the number of a step, found {text!r}")
    return int(text)


def _print_and_exit(text: str) -> NoReturn:
    """Print and exit with 0, also if the reader of a pipe has closed it."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else the interpreter's last flush fails
    sys.exit(SUCCESS)
