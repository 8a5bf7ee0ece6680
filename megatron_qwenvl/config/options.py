"""Options of the command-line programs, spelled like fields: with underscores between words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def current_spelling(option: str) -> str:
    """Return the current spelling of an option: `--dry_run` for `--dry-run`."""
    return option[:2] + option[2:].replace("-", "_")


class OptionParser(argparse.ArgumentParser):
    """Parser that also accepts the dashed spelling of an option (`--dry-run`), with a warning on standard error.

    Up to version 0.2 options were spelled with dashes and fields with underscores. Version 0.3 accepts both for
    options; the next one will accept underscores only.
    """

    quiet = False
    """Print no warning; for all ranks of a run except rank 0."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse like the base class after replacing old spellings."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._current_spelling(argument) for argument in given], namespace)

    def _current_spelling(self, argument: str) -> str:
        option, equals, value = argument.partition("=")
        current = current_spelling(option)
        if not option.startswith("--") or option == current or current not in self._option_string_actions:
            return argument
        if not self.quiet:
            print(
                f"{self.prog}: {option} is written {current}; the next version takes that alone",
                file=sys.stderr,
            )
        return current + equals + value
