"""From a recipe or YAML file and `--section.field value` overrides to one validated configuration.

Everything that is wrong is reported at once: unknown keys, values of the wrong type and contradictions.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .fields import leaf_paths, nearest, plain, section_paths, text_paths
from .recipes import RECIPES
from .schema import RunConfig, SourceConfig
from .validate import find_problems


class ConfigError(Exception):
    """The configuration cannot be used; the message names every problem, one a line."""


@dataclass(frozen=True)
class _Change:
    """One value that a file or the command line sets."""

    path: str
    """Dotted path, not yet checked."""
    value: Any
    origin: str
    """Who set it, for messages: a file's name or the override itself."""


class _YamlLoader(yaml.SafeLoader):
    """YAML whose plain scalars mean what they look like: null, true, false, decimal numbers, else text.

    YAML 1.1 would read `2e-4` as text, `no` as false, `010` as eight and take the last of two equal keys.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as in the base class

    def construct_document(self, node: yaml.Node) -> Any:
        self.deep_construct = True  # a value that contains itself is an error
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name!r} appears twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


class _YamlDumper(yaml.SafeDumper):
    """Writes text that `_YamlLoader`, or any other reader of YAML, would take for something else in quotes."""


_NEVER = 1 << 30
"""A width at which no value is broken over lines."""

for _tag, _pattern in {
    "null": r"~|null|",
    "bool": r"true|false",
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+",
}.items():
    for _side in (_YamlLoader, _YamlDumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^({_pattern})$"), None)


def load_config(recipe: str, overrides: Sequence[str] = (), world_size: int | None = None) -> RunConfig:
    """Resolve and validate the configuration of a run.

    Args:
        recipe: name of a recipe, or path of a YAML file. The file holds differences to the recipe that its key
            `base` names, or, without `base`, to the schema's defaults (a saved configuration is complete).
        overrides: `--section.field value` or `--section.field=value`. A field of type text takes the value as it is
            (in quotes: without them; `null` where that is allowed); other values are YAML. The last one wins.
        world_size: number of processes, checked against the parallel layout if given.

    Raises:
        ConfigError: the recipe is unknown, the file unreadable, a key unknown, a value of the wrong type, or
            values contradict each other. All problems that can be found together are in one message.
    """
    base, changes = _read_recipe(recipe)
    override_changes, problems = _parse_overrides(overrides)
    accepted, unknown = _split_unknown(changes + override_changes)
    config, type_problems, unread = _apply(base, accepted)
    contradictions = find_problems(config, world_size)
    # A contradiction with a value that could not be read would only confuse.
    contradictions = [
        line for line in contradictions if not any(re.search(rf"\b{path}\b", line) for path in unread)
    ]
    problems = problems + unknown + type_problems + contradictions
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n  ".join([f"configuration {recipe}: {count}", *problems]))
    return config


def dump_yaml(config: RunConfig) -> str:
    """The complete configuration as YAML that `load_config` reads back to an equal one."""
    text = yaml.dump(plain(config), Dumper=_YamlDumper, sort_keys=False, allow_unicode=True, width=_NEVER)
    return str(text)


def _read_recipe(recipe: str) -> tuple[RunConfig, list[_Change]]:
    """The configuration to start from and a file's changes to it."""
    if recipe in RECIPES:
        return RECIPES[recipe](), []
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml") and not os.path.isfile(path):
        raise ConfigError(_unknown_recipe(recipe, or_file=" or a .yaml file"))
    tree = _read_yaml_file(path)
    base = tree.pop("base", None)
    if base is None:
        return RunConfig(), list(_flatten(tree, recipe))
    if base not in RECIPES:
        raise ConfigError(f"{recipe}: base: {_unknown_recipe(str(base))}")
    return RECIPES[base](), list(_flatten(tree, recipe))


def _unknown_recipe(name: str, or_file: str = "") -> str:
    return f"unknown recipe {name!r}: expected one of {', '.join(RECIPES)}{or_file}{nearest(name, RECIPES)}"


def _read_yaml_file(path: Path) -> dict[Any, Any]:
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_reason(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {_show(tree)}")
    return tree


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_YamlLoader)  # a SafeLoader


def _yaml_reason(error: yaml.YAMLError) -> str:
    """One line instead of PyYAML's five."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"


def _flatten(value: Any, origin: str, path: str = "") -> Iterator[_Change]:
    """One change per value; mappings are descended into where the schema has a section."""
    if isinstance(value, dict) and (not path or path in section_paths()):
        for key, inner in value.items():
            yield from _flatten(inner, origin, f"{path}.{key}" if path else str(key))
    else:
        yield _Change(path, value, origin)


def _parse_overrides(arguments: Sequence[str]) -> tuple[list[_Change], list[str]]:
    """The overrides as changes, and what is wrong with their form."""
    changes: list[_Change] = []
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
            changes.extend(_flatten(_parse_value(path, text), f"--{path}", path))
        except yaml.YAMLError as error:
            problems.append(f"--{path}: {text!r} is not valid YAML: {_yaml_reason(error)}")
        except ValueError as error:
            problems.append(f"--{path}: {text!r}: {error}")
    return changes, problems


def _parse_value(path: str, text: str) -> Any:
    """What an override's text means for the field at `path`.

    Raises:
        YAMLError: not YAML, for a field that is not text.
        ValueError: the text is not UTF-8, or a part of it would be taken for a comment.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("expected UTF-8")
    if path in text_paths():
        if not text or (text_paths()[path] and text in ("null", "~")):
            return None
        return _without_quotes(text)
    if comment := _comment_in(text):
        raise ValueError(f"{comment!r} would be left out as a comment: write text with # in it in quotes")
    return _parse_yaml(text)


def _without_quotes(text: str) -> str:
    """The text, or what stands between its quotes if YAML would read all of it as one quoted value."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        with suppress(yaml.YAMLError):
            node = yaml.compose(text, Loader=_YamlLoader)
            if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(text):
                return str(node.value)
    return text


def _comment_in(text: str) -> str:
    """What YAML would leave out as a comment; empty if nothing.

    Raises:
        YAMLError: not YAML.
    """
    end = 0
    for token in yaml.scan(text, Loader=_YamlLoader):
        between = text[end : token.start_mark.index]
        if "#" in between:
            return between.strip()
        end = token.end_mark.index
    return ""


def _hint(path: str) -> str:
    return "" if path in leaf_paths() else nearest(path, leaf_paths())


def _split_unknown(changes: Sequence[_Change]) -> tuple[list[_Change], list[str]]:
    """The changes of known fields, and a problem for each of the others."""
    known, sections = leaf_paths(), section_paths()
    accepted = [change for change in changes if change.path in known]
    problems = []
    for change in changes:
        if change.path in sections:
            problems.append(f"{change.path}: expected a mapping of fields, found {_show(change.value)}")
        elif change.path not in known:
            problems.append(f"{change.path}: unknown key ({change.origin}){nearest(change.path, known)}")
    return accepted, problems


def _apply(base: RunConfig, changes: Sequence[_Change]) -> tuple[RunConfig, list[str], set[str]]:
    """Apply changes to `base`.

    Returns:
        The configuration, in which a field whose new value has the wrong type keeps its old one; a problem for
        each of these; their paths.
    """
    tree = plain(base)
    original = copy.deepcopy(tree)
    for change in changes:
        _set(tree, change.path, change.value)
    problems, unread = [], set()
    try:
        return _validate(tree), [], set()
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            problems.append(_describe(error))
            unread.add(_leaf_of(error))
    for path in unread:
        _set(tree, path, _get(original, path))
    return _validate(tree), problems, unread


def _validate(tree: dict[str, Any]) -> RunConfig:
    """Strict in types, as JSON is: text is no number, a number no truth value, an integer is a number."""
    return RunConfig.model_validate_json(json.dumps(tree, default=str), strict=True)


def _get(tree: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    parent, _, name = path.rpartition(".")
    (_get(tree, parent) if parent else tree)[name] = value


def _leaf_of(error: ErrorDetails) -> str:
    """Path of the field that an error lies in: errors inside a list element name more than the field."""
    names = [str(part) for part in error["loc"]]
    return next(path for end in range(1, len(names) + 1) if (path := ".".join(names[:end])) in leaf_paths())


def _describe(error: ErrorDetails) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{path}: required but not given"
    if error["type"] == "extra_forbidden":  # only inside a list of sources: other unknown keys never get here
        return f"{path}: unknown key{nearest(str(error['loc'][-1]), SourceConfig.model_fields)}"
    expected = (
        error["msg"].replace("Input should be", "expected").replace("valid array", "list, such as [a, b]")
    )
    return f"{path}: {expected}, found {_show(error['input'])}"


def _show(value: Any) -> str:
    """A value as the user wrote it, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
