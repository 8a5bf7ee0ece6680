"""Line charts as SVG text, for pages without scripts or libraries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
"""Size of a chart in SVG units."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 26, 34
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706")


@dataclass(frozen=True)
class Curve:
    """One curve.

    Attributes:
        name: its entry in the legend.
        points: `(x, y)` in rising order of x; values that are not finite leave a gap.
        marked: draw a dot at every point, for curves of few points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    marked: bool = False


@dataclass(frozen=True)
class _Axis:
    """Maps values to SVG units; `first` and `last` are the ends of the axis, at `start` and `end`."""

    first: float
    last: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.first) / (self.last - self.first) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About five round values within the axis."""
        step = _round_step((self.last - self.first) / 5)
        count = math.floor(self.last / step + 1e-9)
        return [k * step for k in range(math.ceil(self.first / step - 1e-9), count + 1)]


def line_chart(lines: Sequence[Curve], x_label: str, y_label: str) -> str:
    """Draw curves over one pair of axes; the y axis starts at 0 unless a value is negative.

    Returns:
        An `<svg>` element; a `<p>` element if no curve has a finite point.
    """
    points = [point for line in lines for point in line.points if math.isfinite(point[1])]
    if not points:
        return "<p>No values yet.</p>"
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_axis = _axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    y_axis = _axis(min(0.0, min(ys)), max(ys), HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)} over {escape(x_label)}">',
        *_grid(x_axis, y_axis),
        f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>',
        f'<text x="4" y="{_TOP - 12}">{escape(y_label)}</text>',
    ]
    for number, line in enumerate(lines):
        parts += _curve(line, _COLOURS[number % len(_COLOURS)], x_axis, y_axis)
        parts.append(_legend(line.name, number))
    return "\n".join([*parts, "</svg>"])


def _axis(first: float, last: float, start: float, end: float) -> _Axis:
    return _Axis(first, last if last > first else first + 1.0, start, end)


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, 50 ... times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    parts = []
    for value in y_axis.ticks():
        y = y_axis.at(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_axis.ticks():
        x = x_axis.at(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    return parts


def _curve(line: Curve, colour: str, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    path, drawn, dots = "", False, []
    for x, y in line.points:
        if not math.isfinite(y):
            drawn = False
            continue
        place = f"{x_axis.at(x):.1f} {y_axis.at(y):.1f}"
        path += f"{'L' if drawn else 'M'}{place}"
        drawn = True
        if line.marked:
            cx, cy = place.split()
            dots.append(f'<circle cx="{cx}" cy="{cy}" r="3" fill="{colour}"/>')
    return [f'<path fill="none" stroke="{colour}" stroke-width="1.5" d="{path}"/>', *dots]


def _legend(name: str, number: int) -> str:
    """An entry above the curves, the first one outermost."""
    colour, x = _COLOURS[number % len(_COLOURS)], WIDTH - _RIGHT - 110 * number
    return f'<text x="{x}" y="{_TOP - 12}" text-anchor="end" fill="{colour}">{escape(name)}</text>'
