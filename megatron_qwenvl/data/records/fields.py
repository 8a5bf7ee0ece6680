"""The types of which every record is made: one rule for text and one for coordinates, wherever they occur."""

from __future__ import annotations

import string
import unicodedata
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StringConstraints

_BYTE_ORDER_MARK = "\ufeff"
_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}


class Record(BaseModel):
    """Base of every record and of its parts."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: empty, blanks, control and zero-width characters."""
    return all(unicodedata.category(character) in _INVISIBLE for character in text)


def visible(text: str) -> str:
    """Remove invisible characters from a text; blanks and line ends stay."""
    if text.isascii():
        return text
    return "".join(character for character in text if unicodedata.category(character) != "Cf")


def excerpt(text: str, length: int = 40) -> str:
    """Quote the beginning of a text in one line, for a message."""
    return " ".join(text[:length].split())


def _clean(value: Any) -> Any:
    """Drop a byte-order mark at the start; refuse a string that is no text."""
    if not isinstance(value, str):
        return value  # the field's own type explains
    if "\0" in value:
        raise ValueError("a NUL character: not text, or decoded wrongly")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate: half of a character") from None
    start = len(value) - len(value.lstrip(_BYTE_ORDER_MARK + string.whitespace))
    return value[:start].replace(_BYTE_ORDER_MARK, "") + value[start:]


def _visible(value: str) -> str:
    if is_blank(value):
        raise ValueError("empty or blank text")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, found a boolean")
    return value


AnyText = Annotated[str, BeforeValidator(_clean)]
"""Text that may be empty."""
VerbatimText = Annotated[str, BeforeValidator(_clean), AfterValidator(_visible)]
"""Text that shows something, with its outer blanks."""
Text = Annotated[
    str, BeforeValidator(_clean), StringConstraints(strip_whitespace=True), AfterValidator(_visible)
]
"""Text that shows something, without its outer blanks."""

Coordinate = Annotated[float, BeforeValidator(_number)]
Point = tuple[Coordinate, Coordinate]
Box = tuple[Coordinate, Coordinate, Coordinate, Coordinate]
Quad = tuple[Point, Point, Point, Point]
