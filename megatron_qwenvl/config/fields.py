"""Fields of the schema as dotted paths, for overrides, error messages and `--help`."""

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
    """Yield every field below `section` with its dotted path in schema order, sections before their fields."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if is_section(field):
            yield from walk_fields(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]


def is_section(field: FieldInfo) -> bool:
    """Return whether the field is a section of fields and not a value."""
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
    """Dotted paths of the text fields, and whether each may be null."""
    found = {}
    for path, field in walk_fields(RunConfig):
        kinds = set(get_args(field.annotation)) or {field.annotation}
        if str in kinds and kinds <= {str, type(None)}:
            found[path] = type(None) in kinds
    return found


SOURCE_LISTS = ("data.sources", "data.validation_sources")
"""Lists of sources. Fields of one source can be overridden by its name."""
SOURCE_FIELDS = tuple(name for name in SourceConfig.model_fields if name != "name")
"""Fields of a source that can be overridden by the source's name."""
SOURCE_TEXTS = tuple(name for name in SOURCE_FIELDS if SourceConfig.model_fields[name].annotation is str)
"""Text fields among `SOURCE_FIELDS`."""


def split_source_path(path: str) -> tuple[str, str, str] | None:
    """Split `data.sources.NAME.FIELD` into the list, the source's name and the field; None for any other path."""
    for sources in SOURCE_LISTS:
        name, _, field = path.removeprefix(f"{sources}.").rpartition(".")
        if path.startswith(f"{sources}.") and name:
            return sources, name, field
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """Format `; did you mean X?` with the known name most similar to `name`; empty if none is similar.

    A bare field name finds its dotted path: `steps` finds `train.steps`.
    """
    candidates = sorted(known)
    same_field = [path for path in candidates if path.rpartition(".")[2] == name.rpartition(".")[2]]
    matches = difflib.get_close_matches(
        name, same_field or candidates, n=1, cutoff=0.0 if same_field else 0.5
    )
    return f"; did you mean {matches[0]}?" if matches else ""


def describe_type(annotation: Any) -> str:
    """Describe the type of a field: `integer`, `none|isolated|interleaved`, `list of integer or null`."""
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
    """Format the default value of a field as YAML."""
    default = field.default
    if field.is_required():
        return "required"
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return "[]" if default == () else str(default)


def plain(config: BaseModel) -> dict[str, Any]:
    """Convert the configuration to nested dictionaries and lists of plain values."""
    return config.model_dump(mode="json")


def quote_value(value: Any) -> str:
    """Quote a value as the user wrote it, truncated to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
