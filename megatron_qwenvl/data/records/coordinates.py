"""Boxes and quadrilaterals: from pixels of an image to the model's thousandths, and the checks of both."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_qwenvl.data.errors import SampleError

from .fields import Box, Point, Quad

Corner = tuple[int, int]
"""x and y in [0, 1000)."""


def normalise(point: Point, width: int, height: int) -> Corner:
    """Convert pixels to integers in [0, 1000): floor(1000 x / width); points outside move to the border."""
    x, y = (
        min(math.floor(1000 * min(max(at, 0), size) / size), 999)
        for at, size in zip(point, (width, height), strict=True)
    )
    return x, y


def box_corners(box: Box, width: int, height: int) -> list[Corner]:
    """Return the top-left and bottom-right corner of a box given in pixels.

    Raises:
        SampleError: the box is empty, reversed, or wholly outside of the image.
    """
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2 and x2 > 0 and y2 > 0 and x1 < width and y1 < height):
        raise SampleError(f"box {box} is empty or outside of the {width}x{height} image")
    return [normalise((x1, y1), width, height), normalise((x2, y2), width, height)]


def quad_corners(quad: Quad, width: int, height: int) -> list[Corner]:
    """Return the four corners of a quadrilateral given in pixels.

    Raises:
        SampleError: it is empty, counter-clockwise, crosses itself, or lies wholly outside of the image.
    """
    xs, ys = zip(*quad, strict=True)
    if not (max(xs) > 0 and max(ys) > 0 and min(xs) < width and min(ys) < height):
        raise SampleError(f"quad {quad} is outside of the {width}x{height} image")
    if not _area(quad) > 0 or _crosses_itself(quad):
        raise SampleError(f"quad {quad} is empty or its corners are not clockwise")
    return [normalise(point, width, height) for point in quad]


def box_problem(corners: Sequence[Corner]) -> str | None:
    """Explain why two corners in thousandths are no box; they may coincide in x or y, as they are rounded."""
    (x1, y1), (x2, y2) = corners
    if x1 > x2 or y1 > y2:
        return "has reversed corners"
    return "is a single point" if (x1, y1) == (x2, y2) else None


def quad_problem(corners: Sequence[Corner]) -> str | None:
    """Explain why four corners in thousandths are no quadrilateral; they may lie on a line, as they are rounded."""
    if len(set(corners)) == 1:
        return "is a single point"
    return "has corners that are not clockwise" if _area(corners) < 0 or _crosses_itself(corners) else None


def write_corners(corners: Sequence[Corner]) -> str:
    """Write corners as the model reads and writes them: `(x,y),(x,y)..`."""
    return ",".join(f"({x},{y})" for x, y in corners)


def _area(points: Sequence[Point] | Sequence[Corner]) -> float:
    """Compute twice the area; positive when clockwise, as y points down."""
    following = [*points[1:], points[0]]
    area: float = sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(points, following, strict=True))
    return area


def _crosses_itself(points: Sequence[Point] | Sequence[Corner]) -> bool:
    a, b, c, d = points
    return _cross(a, b, c, d) or _cross(b, c, d, a)


def _cross(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Whether the lines from a to b and from c to d cross."""
    return (_area((a, b, c)) * _area((a, b, d)) < 0) and (_area((c, d, a)) * _area((c, d, b)) < 0)
