"""The fields of the schema as dotted paths, for overrides, error messages and the command line's help."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .schema import RunConfig, Section, SourceConfig


def walk_fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field below `section` with its dotted path, sections before their fields, in reading order."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if is_section(field):
            yield from walk_fields(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]


def is_section(field: FieldInfo) -> bool:
    """True if the field is a group of fields rather than a value."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


@cache
def leaf_paths() -> frozenset[str]:
    """Dotted paths of the values of a run configuration, such as `train.steps`."""
    return frozenset(path for path, field in walk_fields(RunConfig) if not is_section(field))


@cache
def section_paths() -> frozenset[str]:
    """Dotted paths of the sections of a run configuration, such as `model.vision`."""
    return frozenset(path for path, field in walk_fields(RunConfig) if is_section(field))


@cache
def text_paths() -> dict[str, bool]:
    """Dotted paths of the fields that hold any text, and whether they may be null instead."""
    found = {}
    for path, field in walk_fields(RunConfig):
        kinds = set(get_args(field.annotation)) or {field.annotation}
        if str in kinds and kinds <= {str, type(None)}:
            found[path] = type(None) in kinds
    return found


SOURCE_LISTS = ("data.sources", "data.validation_sources")
"""Fields that are lists of sources, of which one field of one source can be changed by the source's name."""
SOURCE_FIELDS = tuple(name for name in SourceConfig.model_fields if name != "name")
"""Fields of a source that can be changed so."""
SOURCE_TEXTS = tuple(name for name in SOURCE_FIELDS if SourceConfig.model_fields[name].annotation is str)
"""Those of them that hold any text."""


def split_source_path(path: str) -> tuple[str, str, str] | None:
    """Split `data.sources.NAME.FIELD` into the list, the source's name and the field; None for any other path."""
    for sources in SOURCE_LISTS:
        name, _, field = path.removeprefix(f"{sources}.").rpartition(".")
        if path.startswith(f"{sources}.") and name:
            return sources, name, field
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name most like `name`, or an empty string where none is similar.

    A bare field name finds its dotted path: `steps` finds `train.steps`.
    """
    candidates = sorted(known)
    same_field = [path for path in candidates if path.rpartition(".")[2] == name.rpartition(".")[2]]
    matches = difflib.get_close_matches(
        name, same_field or candidates, n=1, cutoff=0.0 if same_field else 0.5
    )
    return f"; did you mean {matches[0]}?" if matches else ""


def describe_type(annotation: Any) -> str:
    """The YAML that a field takes, in words: `integer`, `none|isolated|interleaved`, `list of integer or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(choice) for choice in arguments)
    if origin is tuple:
        return f"list of {describe_type(arguments[0])}"
    if annotation is SourceConfig:
        return f"{{{', '.join(SourceConfig.model_fields)}}}"
    names = {int: "integer", float: "number", bool: "true|false", str: "text", type(None): "null"}
    return names[annotation]


def describe_default(field: FieldInfo) -> str:
    """The default as YAML would show it."""
    default = field.default
    if field.is_required():
        return "required"
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return "[]" if default == () else str(default)


def plain(config: BaseModel) -> dict[str, Any]:
    """The configuration as nested dictionaries and lists of plain values."""
    return config.model_dump(mode="json")


def quote_value(value: Any) -> str:
    """Quote a value as the user wrote it, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
