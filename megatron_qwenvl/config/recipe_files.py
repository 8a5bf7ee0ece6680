"""Recipes by name and recipe files, which hold differences to a base: another file, a recipe or the schema."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .fields import SOURCE_LISTS, nearest, quote_value, section_paths
from .recipes import RECIPES
from .schema import RunConfig
from .yaml_format import describe_yaml_error, parse_yaml


class ConfigError(Exception):
    """Invalid configuration; the message names every problem, one per line."""


@dataclass(frozen=True)
class FieldValue:
    """Value of a field that a file or the command line sets."""

    path: str
    """Dotted path, not yet checked."""
    value: Any
    origin: str
    """Origin for messages: the name of a file, or the override itself."""


def read_recipe(recipe: str) -> tuple[RunConfig, list[FieldValue]]:
    """Read a recipe by name, or a file and the files that it is based on.

    Returns:
        The configuration to start from, and the changes of all files to it, those of a base before those of the file.

    Raises:
        ConfigError: a recipe is unknown, a file cannot be read, or files are based on each other.
    """
    if recipe in RECIPES:
        return RECIPES[recipe](), []
    if not _names_file(recipe, Path()):
        raise ConfigError(_unknown_recipe(recipe))
    return _read_file(Path(recipe), recipe, ())


def _read_file(path: Path, name: str, below: Sequence[Path]) -> tuple[RunConfig, list[FieldValue]]:
    """Read a file and its bases; `below` are the files that are based on this one, from the first to the nearest."""
    chain = [*below, path]
    try:
        tree = _read_yaml_file(path)
    except ConfigError as error:
        raise ConfigError("".join(f"{file}: base: " for file in below[-1:]) + str(error)) from None
    if os.path.realpath(path) in map(os.path.realpath, below):
        raise ConfigError(f"{chain[0]}: base: files are based on each other: {' -> '.join(map(str, chain))}")
    base = tree.pop("base", None)
    if base is None:
        start, changes = RunConfig(), list[FieldValue]()
    elif not isinstance(base, str):
        raise ConfigError(f"{name}: base: expected the name of a recipe or a file, found {quote_value(base)}")
    elif base in RECIPES:
        start, changes = RECIPES[base](), []
    elif _names_file(base, path.parent):
        start, changes = _read_file(path.parent / base, str(path.parent / base), chain)
    else:
        raise ConfigError(f"{name}: base: {_unknown_recipe(base)}")
    return start, [*changes, *flatten(tree, name)]


def _names_file(recipe: str, folder: Path) -> bool:
    return Path(recipe).suffix in (".yaml", ".yml") or os.path.isfile(folder / recipe)


def _unknown_recipe(name: str) -> str:
    return f"unknown recipe {name!r}: expected one of {', '.join(RECIPES)} or a .yaml file{nearest(name, RECIPES)}"


def _read_yaml_file(path: Path) -> dict[Any, Any]:
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {describe_yaml_error(error)}") from None
    except (OSError, ValueError) as error:  # bytes that are not UTF-8, a name with a null byte
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {quote_value(tree)}")
    return tree


def flatten(value: Any, origin: str, path: str = "") -> Iterator[FieldValue]:
    """Yield one change per value of a tree; mappings that stand for sections of the schema are flattened.

    A mapping in place of a list of sources changes fields of sources by name: `sources: {vqa: {weight: 2}}`.
    """
    section = not path or path in section_paths()
    source = path in SOURCE_LISTS or path.rpartition(".")[0] in SOURCE_LISTS
    if isinstance(value, dict) and (section or (source and value)):
        for key, inner in value.items():
            yield from flatten(inner, origin, f"{path}.{key}" if path else str(key))
    else:
        yield FieldValue(path, value, origin)
