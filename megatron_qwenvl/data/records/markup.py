"""Grounding markup and images in the text of a dialogue.

Markup are `<img>NAME</img>`, `<ref>text</ref>`, `<box>(x1,y1),(x2,y2)</box>` and
`<quad>(x,y),(x,y),(x,y),(x,y)</quad>` with integers in [0, 1000). Where the meaning is plain it is normalised: blanks
between numbers are dropped, 1000 becomes 999. What only looks like it, an *attempt*, is never taken for text by
accident (`attempts.py`). Everything else is text, HTML and single tags in prose included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_qwenvl.data.errors import SampleError

from .attempts import find_attempt
from .coordinates import Corner, box_problem, quad_problem, write_corners
from .fields import excerpt, is_blank, visible

_TAG = r"</?(?:img|ref|box|quad)>"
_INSIDE = rf"(?:(?!{_TAG}).)"
_MARKUP = re.compile(
    r"(?:(?i:picture|image|图片?)[^\w<]{0,3}(?P<number>\d+)[^\w<]{0,3}[:：][^\w<]{0,3})?<img>(?P<img>[^<>]*)</img>"
    rf"|<ref>(?P<ref>{_INSIDE}+)</ref>"
    rf"|<box>(?P<box>{_INSIDE}*)</box>"
    rf"|<quad>(?P<quad>{_INSIDE}*)</quad>",
    re.DOTALL,
)

_NUMBER = r"\s*([0-9]{1,4})\s*"
_POINT = rf"\s*\({_NUMBER},{_NUMBER}\)\s*"
_POINTS = {
    "box": re.compile(",".join([_POINT] * 2)),
    "quad": re.compile(",".join([_POINT] * 4)),
}


@dataclass(frozen=True)
class Piece:
    """A part of a dialogue's text.

    Attributes:
        kind: `text`, or the tag.
        text: the text; of a pair of tags the text between them, coordinates as the model writes them.
        number: of an `img`, the number that the text gives it.
    """

    kind: Literal["text", "img", "ref", "box", "quad"]
    text: str
    number: int | None = None


def parse_markup(value: str, keep: bool = False) -> list[Piece]:
    """Split the text of a turn into text and markup.

    Args:
        value: the text.
        keep: treat attempts as text.

    Raises:
        SampleError: an attempt at markup that does not parse, unless `keep`.
    """
    pieces = list(_split(value, keep))
    if not keep:
        _refuse_attempts(pieces)
    return pieces


def _split(value: str, keep: bool) -> Iterator[Piece]:
    start = 0
    for match in _MARKUP.finditer(value):
        piece = _parse(match, keep)
        if piece:
            before = value[start : match.start(piece.kind) - len(f"<{piece.kind}>")]
            if before:
                yield Piece("text", before)
            yield piece
            start = match.end()
    if start < len(value):
        yield Piece("text", value[start:])


def _parse(match: re.Match[str], keep: bool) -> Piece | None:
    """Parse the markup of a pair of tags; None if it is text."""
    if match["img"] is not None:
        return Piece("img", match["img"], int(match["number"][:9]) if match["number"] else None)
    if match["ref"] is not None:
        return None if is_blank(match["ref"]) else Piece("ref", match["ref"])
    kind: Literal["box", "quad"] = "box" if match["box"] is not None else "quad"
    inside = match[kind]
    points = _POINTS[kind].fullmatch(visible(inside))
    if not points:
        return None
    numbers = [int(number) for number in points.groups()]
    corners: list[Corner] = [
        (min(x, 999), min(y, 999)) for x, y in zip(numbers[::2], numbers[1::2], strict=True)
    ]
    problem = box_problem(corners) if kind == "box" else quad_problem(corners)
    if max(numbers) > 1000:
        problem = "has a coordinate above 1000"
    if problem and not keep:
        raise SampleError(f"{kind} '{excerpt(inside)}' {problem}")
    return None if problem else Piece(kind, write_corners(corners))


def _refuse_attempts(pieces: list[Piece]) -> None:
    """Raise SampleError for text that looks like markup."""
    grounded = any(piece.kind in ("ref", "box", "quad") for piece in pieces)
    before = None
    for piece in pieces:
        attempt = find_attempt(piece.text, before, grounded) if piece.kind == "text" else None
        if attempt is not None:
            found = excerpt(attempt).replace("'", "`")
            raise SampleError(f"markup that does not parse: '{found}'")
        before = piece.kind
