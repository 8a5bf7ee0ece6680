"""Comparison of a section of a published configuration with what a model computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_qwenvl.checkpoint.storage.json_text import show_json, show_name

from .config_keys import HARMLESS, NAMES, NESTED, SUBJECTS, computes, is_off


@dataclass(frozen=True)
class Expected:
    """Expected value of a key.

    Attributes:
        text: the expectation in words.
        fits: whether a value meets it.
    """

    text: str
    fits: Callable[[object], bool]


def one_of(*values: object) -> Expected:
    """Expect one of some JSON values; numbers are equal to the precision of a float32."""
    return Expected(" or ".join(map(show_json, values)), lambda found: any(is_same(found, v) for v in values))


def named_classes(part: str) -> Expected:
    """A list with a class whose name holds `part`."""
    return Expected(
        f"a class of {part}",
        lambda found: (
            isinstance(found, list) and any(isinstance(name, str) and part in name for name in found)
        ),
    )


NOTHING = Expected("nothing", is_off)
"""A key that must be absent or switched off."""


@dataclass
class Compared:
    """Result of a comparison."""

    problems: list[str] = field(default_factory=list)
    """Differences, each with file, key, expected and found."""
    notes: list[str] = field(default_factory=list)
    """Keys about which nothing is known."""
    given: dict[str, Any] = field(default_factory=dict)
    """Values that were found, one for each subject."""

    def differs(self, path: Path, name: str, expected: str, found: object) -> None:
        """Record that a key has another value than expected."""
        self.problems.append(f"{path}: {name}: expected {expected}, found {show_json(found)}")

    def add(self, other: Compared) -> None:
        """Add the result of another comparison."""
        self.problems += other.problems
        self.notes += [note for note in other.notes if note not in self.notes]
        self.given = {**other.given, **self.given}


def compare_section(
    path: Path,
    prefix: str,
    section: object,
    table: Mapping[str, Expected],
    defaults: Mapping[str, object] | None = None,
    apart: frozenset[str] = frozenset(),
) -> Compared:
    """Compare every key of a section, under all names that it has had.

    Args:
        path: the file.
        prefix: the keys that lead to the section, with a dot at the end.
        section: value in the file.
        table: expected values by subject (`config_keys.NAMES`); subjects that are not in it must be absent or off.
        defaults: meaning of absent keys by name; compared like a key that is present.
        apart: keys that are not compared here.
    """
    found = Compared()
    if not isinstance(section, Mapping):
        found.differs(path, prefix.rstrip("."), "an object", section)
        return found
    for name, value in section.items():
        if name in apart or name.startswith("_") or value is None:
            continue
        if name in NESTED:
            found.add(_compare_nested(path, f"{prefix}{name}.", value, table))
        elif subject := SUBJECTS.get(name):
            found.given[subject] = value
            expected = table.get(subject, NOTHING)
            if not expected.fits(value):
                found.differs(path, f"{prefix}{name}", expected.text, value)
        elif name in HARMLESS:
            continue
        elif computes(name, value):
            found.differs(path, f"{prefix}{show_name(name)}", NOTHING.text, value)
        else:
            found.notes.append(f"note: {path}: {prefix}{show_name(name)} is not known and not regarded")
    for name, value in (defaults or {}).items():
        expected = table[SUBJECTS[name]]
        if SUBJECTS[name] not in found.given and not expected.fits(value):
            found.problems.append(
                f"{path}: {prefix}{name}: expected {expected.text}, found nothing, which means {show_json(value)}"
            )
    return found


def _compare_nested(path: Path, prefix: str, section: object, table: Mapping[str, Expected]) -> Compared:
    """Compare a nested object: keys that only such an object has affect the computation, whatever their name."""
    found = compare_section(path, prefix, section, table)
    for name, value in section.items() if isinstance(section, Mapping) else ():
        unknown = name not in SUBJECTS and name not in HARMLESS
        if unknown and not computes(name, value) and not is_off(value):
            found.differs(path, f"{prefix}{show_name(name)}", NOTHING.text, value)
    return found


def not_said(found: Compared, prefix: str, subjects: tuple[str, ...]) -> list[str]:
    """Names of those subjects that the section does not state."""
    return [f"{prefix}{NAMES[subject][0]}" for subject in subjects if subject not in found.given]


def is_same(found: object, expected: object) -> bool:
    """Whether two JSON values are the same; numbers to the precision of a float32."""
    if is_number(found) and is_number(expected):
        return math.isclose(found, expected, rel_tol=1e-6)  # type: ignore[arg-type]
    return type(found) is type(expected) and found == expected


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
