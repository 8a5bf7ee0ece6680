"""YAML dialect of the configurations: only null, true, false and decimal numbers are not text."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import yaml


class _YamlLoader(yaml.SafeLoader):
    """Loader that reads plain scalars as null, true, false or decimal numbers, and all others as text.

    YAML 1.1 would read `2e-4` as text, `no` as false, `010` as eight and take the last of two equal keys.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as in the base class

    def construct_document(self, node: yaml.Node) -> Any:
        self.deep_construct = True  # a value that contains itself is an error
        return super().construct_document(node)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{value!r} holds half of a surrogate pair", node.start_mark
            )
        return value

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
    """Dumper that quotes text which `_YamlLoader`, or any other YAML reader, would not read as text."""


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


def parse_yaml(text: str) -> Any:
    """Parse a document of plain data.

    Raises:
        YAMLError: not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_YamlLoader)  # a SafeLoader
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, lists in lists in lists ...
        raise yaml.YAMLError(str(error)) from None


def write_yaml(tree: Any) -> str:
    """Write plain data so that `parse_yaml`, and any other reader of YAML, gives an equal value."""
    return str(yaml.dump(tree, Dumper=_YamlDumper, sort_keys=False, allow_unicode=True, width=_NEVER))


def describe_yaml_error(error: yaml.YAMLError) -> str:
    """Describe an error in one line, where PyYAML takes five."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"


def without_quotes(text: str) -> str:
    """Remove the quotes of a text that is, as a whole, one quoted YAML value; other text is returned unchanged."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        with suppress(yaml.YAMLError):
            node = yaml.compose(text, Loader=_YamlLoader)
            if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(text):
                return str(node.value)
    return text


def find_comment(text: str) -> str:
    """Find the part of a text that YAML would ignore as a comment; empty without one.

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
