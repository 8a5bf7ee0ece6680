"""Report as one self-contained HTML page: loss curves, scores, and images with questions and answers.

Images and charts are embedded and there are no scripts, so that the page can be mailed or archived. All text of models
and data sets is escaped.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from PIL import Image

from megatron_qwenvl.data.images import image_size, load_pixels

from .charts import Curve, line_chart

THUMBNAIL = 320
"""Largest side of an image in the page, in pixels; smaller ones are enlarged by the browser."""
_MAX_PIXELS = 200_000_000
Polygon = tuple[tuple[float, float], ...]

_PAIR = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)")
_SHAPE = re.compile(r"(?:\(\s*\d+\s*,\s*\d+\s*\)\s*,?\s*)+")
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }
h2 { margin-top: 2.2rem; border-bottom: 1px solid #e5e7eb }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; border-bottom: 1px solid #e5e7eb; text-align: left }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 1rem }
.card { border: 1px solid #e5e7eb; border-radius: 6px; padding: .6rem; overflow-wrap: anywhere }
.right { border-left: 5px solid #059669 } .wrong { border-left: 5px solid #dc2626 }
.image { position: relative } .image img { width: 100%; display: block; image-rendering: pixelated }
.image svg { position: absolute; inset: 0; width: 100%; height: 100% }
.image polygon { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke }
.true { stroke: #059669 } .predicted { stroke: #dc2626; stroke-dasharray: 5 3 }
.expected { color: #059669 } .charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)) }
.chart { width: 100%; font-size: 11px } .grid { stroke: #e5e7eb } p.note { color: #6b7280 }
"""


@dataclass(frozen=True)
class Example:
    """A question with its answer.

    Attributes:
        image: encoded bytes; None for a question without an image.
        question: the text of the prompt.
        answer: the model's text.
        expected: the reference answer; empty if there is none.
        right: whether the answer counts as correct; None if it is not scored.
        true_shapes: reference boxes or quads as corner points in [0, 1000).
        predicted_shapes: boxes or quads of the answer, likewise.
    """

    image: bytes | None
    question: str
    answer: str
    expected: str = ""
    right: bool | None = None
    true_shapes: tuple[Polygon, ...] = ()
    predicted_shapes: tuple[Polygon, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Curves over steps, with a title."""

    title: str
    lines: Sequence[Curve]
    x_label: str = "step"
    y_label: str = "loss"


@dataclass(frozen=True)
class Report:
    """Content of the page.

    Attributes:
        title: heading of the page.
        summary: one or more sentences below it.
        charts: curves, in order.
        scores: value by name; numbers are printed with three digits.
        examples: cards by section title.
    """

    title: str
    summary: str = ""
    charts: Sequence[Chart] = ()
    scores: Mapping[str, float | str] = field(default_factory=dict)
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)


def find_shapes(text: str) -> tuple[Polygon, ...]:
    """Find boxes (two corners) and quads (four corners) in a text, as polygons in the text's units.

    Other numbers of points are ignored.
    """
    found: list[Polygon] = []
    for match in _SHAPE.finditer(text):
        points = [(float(x), float(y)) for x, y in _PAIR.findall(match[0])]
        if len(points) == 2:
            found.append(box_polygon((*points[0], *points[1])))
        elif len(points) == 4:
            found.append(tuple(points))
    return tuple(found)


def box_polygon(box: tuple[float, float, float, float]) -> Polygon:
    """The four corners of `(x1, y1, x2, y2)`, clockwise from the first."""
    x1, y1, x2, y2 = box
    return (x1, y1), (x2, y1), (x2, y2), (x1, y2)


def render_report(report: Report) -> str:
    """Render the page as HTML text.

    Raises:
        SampleError: an image cannot be decoded.
    """
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(report.title)}</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(report.title)}</h1>",
        f"<p>{escape(report.summary)}</p>",
        *_scores(report.scores),
        *_charts(report.charts),
    ]
    for title, examples in report.examples.items():
        parts += [f"<h2>{escape(title)}</h2>", *_legend(examples), '<div class="cards">']
        parts += [_card(example) for example in examples]
        parts.append("</div>")
    return "\n".join([*parts, "</body></html>", ""])


def _scores(scores: Mapping[str, float | str]) -> Iterable[str]:
    if scores:
        yield "<h2>Scores</h2><table>"
        for name, value in scores.items():
            shown = value if isinstance(value, str) else f"{value:.3f}"
            yield f"<tr><td>{escape(name)}</td><td>{escape(shown)}</td></tr>"
        yield "</table>"


def _charts(charts: Sequence[Chart]) -> Iterable[str]:
    if charts:
        yield '<h2>Training</h2><div class="charts">'
        for chart in charts:
            drawn = line_chart(chart.lines, chart.x_label, chart.y_label)
            yield f"<div><h3>{escape(chart.title)}</h3>{drawn}</div>"
        yield "</div>"


def _legend(examples: Sequence[Example]) -> Iterable[str]:
    if any(example.true_shapes or example.predicted_shapes for example in examples):
        yield '<p class="note">Solid green: the reference. Dashed red: the answer.</p>'


def _card(example: Example) -> str:
    state = {None: "", True: " right", False: " wrong"}[example.right]
    expected = (
        f'<br><span class="expected">expected: {escape(example.expected)}</span>' if example.expected else ""
    )
    return (
        f'<div class="card{state}">{_image(example)}<p>{escape(example.question)}<br>'
        f"<b>{escape(example.answer) or '(no answer)'}</b>{expected}</p></div>"
    )


def _image(example: Example) -> str:
    if example.image is None:
        return ""
    width, height = image_size(example.image)
    shapes = _polygons(example.true_shapes, "true") + _polygons(example.predicted_shapes, "predicted")
    overlay = f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{shapes}</svg>' if shapes else ""
    url = _data_url(example.image, min(THUMBNAIL, max(width, height)))
    ratio = f'style="aspect-ratio: {width} / {height}"'
    return f'<div class="image"><img alt="" {ratio} src="{url}">{overlay}</div>'


def _polygons(shapes: Sequence[Polygon], kind: str) -> str:
    return "".join(
        f'<polygon class="{kind}" points="{" ".join(f"{x:g},{y:g}" for x, y in shape)}"/>' for shape in shapes
    )


def _data_url(data: bytes, side: int) -> str:
    """Encode the image, resized to a square as for the model, as a PNG; the page restores its aspect ratio."""
    pixels = load_pixels(data, side, _MAX_PIXELS).transpose(1, 2, 0)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
