"""Loading of a configuration from a recipe or YAML file and `--section.field value` overrides.

All problems are reported together: unknown keys, values of the wrong type and contradictions.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .fields import (
    SOURCE_FIELDS,
    SOURCE_LISTS,
    SOURCE_TEXTS,
    leaf_paths,
    nearest,
    plain,
    quote_value,
    section_paths,
    split_source_path,
    text_paths,
)
from .recipe_files import ConfigError, FieldValue, flatten, read_recipe
from .schema import RunConfig, SourceConfig
from .validate import find_problems
from .yaml_format import describe_yaml_error, find_comment, parse_yaml, without_quotes, write_yaml

__all__ = ["ConfigError", "dump_yaml", "load_config"]


def load_config(recipe: str, overrides: Sequence[str] = (), world_size: int | None = None) -> RunConfig:
    """Resolve and validate the configuration of a run.

    Args:
        recipe: name of a recipe, or path of a YAML file. The file holds differences from its `base` (a recipe, or
            another file, relative to this one) or, without `base`, from the schema's defaults (a saved configuration
            is complete).
        overrides: `--section.field value` or `--section.field=value`. A text field takes the value as it is (without
            enclosing quotes; `null` if it may be null); other values are YAML. The last override of a field wins.
            `--data.sources.NAME.weight value` changes one field of the source of that name.
        world_size: number of processes, checked against the parallel layout if given.

    Raises:
        ConfigError: the recipe is unknown, the file unreadable, a key unknown, a value of the wrong type, or
            values contradict each other. All problems that can be found together are in one message.
    """
    base, changes = read_recipe(recipe)
    override_changes, problems = _parse_overrides(overrides)
    accepted, unknown = _split_unknown(changes + override_changes)
    config, type_problems, unread = _apply(base, accepted)
    contradictions = find_problems(config, world_size)
    # Contradictions with the old value of a field whose new value is invalid would be misleading.
    contradictions = [
        line for line in contradictions if not any(re.search(rf"\b{path}\b", line) for path in unread)
    ]
    problems = problems + unknown + type_problems + contradictions
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n  ".join([f"configuration {recipe}: {count}", *problems]))
    return config


def dump_yaml(config: RunConfig) -> str:
    """Write the complete configuration as YAML that `load_config` reads back to an equal one."""
    return write_yaml(plain(config))


def _parse_overrides(arguments: Sequence[str]) -> tuple[list[FieldValue], list[str]]:
    """Parse the overrides; returns the changes and the problems of malformed ones."""
    changes: list[FieldValue] = []
    problems: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            problems.append(f"unexpected argument {argument!r}: expected --section.field value")
            continue
        path, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                is_value = rest and rest[0][2:].partition("=")[0] not in leaf_paths()
                dashes = f" (one that begins with -- is given as --{path}=VALUE)" if is_value else ""
                problems.append(f"--{path}: expected a value, found none{dashes}{_hint(path)}")
                continue
            text = rest.pop(0)
        try:
            changes.extend(flatten(_parse_value(path, text), f"--{path}", path))
        except yaml.YAMLError as error:
            problems.append(f"--{path}: {text!r} is not valid YAML: {describe_yaml_error(error)}")
        except ValueError as error:
            problems.append(f"--{path}: {text!r}: {error}")
    return changes, problems


def _parse_value(path: str, text: str) -> Any:
    """Parse the text of an override as a value of the field at `path`.

    Raises:
        YAMLError: not YAML, for a field that is not text.
        ValueError: the text is not UTF-8, or a part of it would be taken for a comment.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("expected UTF-8")
    source = split_source_path(path)
    if source and source[2] in SOURCE_TEXTS:
        return without_quotes(text)
    if path in text_paths():
        if not text or (text_paths()[path] and text in ("null", "~")):
            return None
        return without_quotes(text)
    if comment := find_comment(text):
        raise ValueError(f"{comment!r} would be left out as a comment: write text with # in it in quotes")
    return parse_yaml(text)


def _hint(path: str) -> str:
    return "" if path in leaf_paths() else nearest(path, leaf_paths())


def _split_unknown(changes: Sequence[FieldValue]) -> tuple[list[FieldValue], list[str]]:
    """Return the changes of known fields, and a problem for each of the others."""
    known, sections = leaf_paths(), section_paths()
    accepted, problems = [], []
    for change in changes:
        source = split_source_path(change.path)
        if change.path in known or (source and source[2] in SOURCE_FIELDS):
            accepted.append(change)
        elif source:
            hint = nearest(source[2], SOURCE_FIELDS)
            problems.append(f"{change.path}: unknown key ({change.origin}){hint}")
        elif change.path in sections:
            problems.append(f"{change.path}: expected a mapping of fields, found {quote_value(change.value)}")
        else:
            problems.append(f"{change.path}: unknown key ({change.origin}){nearest(change.path, known)}")
    return accepted, problems


def _apply(base: RunConfig, changes: Sequence[FieldValue]) -> tuple[RunConfig, list[str], set[str]]:
    """Apply changes to `base`.

    Returns:
        The configuration, in which a field whose new value has the wrong type keeps its old one; a problem for
        each of these; their paths.
    """
    tree = plain(base)
    original = copy.deepcopy(tree)
    problems, unread = [], set[str]()
    for change in changes:
        if source := split_source_path(change.path):
            problems.extend(_set_in_source(tree, *source, change))
        else:
            _set(tree, change.path, change.value)
    try:
        return _validate(tree), problems, unread
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            problems.append(_describe(error, _path_as_given(error["loc"], tree, changes)))
            unread.add(_leaf_of(error))
    for path in unread:
        _set(tree, path, _get(original, path))
    return _validate(tree), problems, unread


def _validate(tree: dict[str, Any]) -> RunConfig:
    """Validate with the strict types of JSON: no text for a number, no number for a bool; integers are numbers."""
    return RunConfig.model_validate_json(json.dumps(tree, default=str), strict=True)


def _get(tree: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    parent, _, name = path.rpartition(".")
    (_get(tree, parent) if parent else tree)[name] = value


def _set_in_source(
    tree: dict[str, Any], sources: str, name: str, field: str, change: FieldValue
) -> list[str]:
    """Change one field of the source of a name; returns a problem if there is no such source."""
    listed = _get(tree, sources)
    if not isinstance(listed, list):
        return []  # the list itself has the wrong type, which is reported
    named = {str(entry.get("name")): entry for entry in listed if isinstance(entry, dict)}
    if name in named:
        named[name][field] = change.value
        return []
    names = ", ".join(named) or "none"
    return [f"{change.path}: unknown source ({change.origin}): expected one of {names}{nearest(name, named)}"]


def _leaf_of(error: ErrorDetails) -> str:
    """Path of the field that an error lies in: errors inside a list element name more than the field."""
    names = [str(part) for part in error["loc"]]
    return next(path for end in range(1, len(names) + 1) if (path := ".".join(names[:end])) in leaf_paths())


def _path_as_given(names: Sequence[int | str], tree: dict[str, Any], changes: Sequence[FieldValue]) -> str:
    """Dotted path of an error: with a source's name where the field was changed by it, else with its number."""
    path = [str(name) for name in names]
    if ".".join(path[:2]) in SOURCE_LISTS and len(path) > 3:
        entry = _get(tree, ".".join(path[:2]))[int(path[2])]
        by_name = ".".join([*path[:2], str(entry["name"]), path[3]]) if "name" in entry else ""
        if any(change.path == by_name for change in changes):
            return by_name
    return ".".join(path)


def _describe(error: ErrorDetails, path: str) -> str:
    if error["type"] == "missing":
        return f"{path}: required but not given"
    if error["type"] == "extra_forbidden":  # only inside a list of sources: other unknown keys never get here
        return f"{path}: unknown key{nearest(str(error['loc'][-1]), SourceConfig.model_fields)}"
    expected = (
        error["msg"].replace("Input should be", "expected").replace("valid array", "list, such as [a, b]")
    )
    return f"{path}: {expected}, found {quote_value(error['input'])}"
