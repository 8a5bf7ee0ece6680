"""Drawn images for the demo and the tests: coloured shapes and a digit, each in its own quarter of the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from megatron_qwenvl.data.records.fields import Box, Quad

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (220, 30, 30),
    "green": (20, 150, 50),
    "blue": (40, 70, 230),
    "yellow": (250, 220, 20),
    "purple": (150, 40, 180),
    "black": (10, 10, 10),
}
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
"""In raster order: quarter i is column i % 2, row i // 2."""
DIGITS = "0123456789"
SIDES = (112, 128)
"""Widths and heights of images in pixels."""

# Near the mean of natural images, which normalisation maps to zero: what is drawn stands out.
_BACKGROUNDS = ((118, 118, 118), (110, 118, 128), (128, 118, 108), (128, 128, 128))
_INK = (255, 255, 255)
# In fractions of the image's sides. Digits, of which there are most kinds, move least.
_RADIUS = (0.17, 0.21)
_FONT_SIZE = 0.5
_FIGURE_JITTER = 0.015
_DIGIT_JITTER = 0.004
# In pixels.
_STROKE = 2
_OUTLINE = 4


@dataclass(frozen=True)
class Figure:
    """A shape: its centre and radius in pixels."""

    shape: str
    color: str
    quarter: int
    x: float
    y: float
    radius: float

    @property
    def box(self) -> Box:
        """Bounding square in pixels."""
        r = self.radius
        return (round(self.x - r, 1), round(self.y - r, 1), round(self.x + r, 1), round(self.y + r, 1))


@dataclass(frozen=True)
class Lettering:
    """A short text: its centre and the size of its font in pixels."""

    text: str
    x: float
    y: float
    size: int

    @property
    def quad(self) -> Quad:
        """The corners of the text's ink in pixels, clockwise from the top-left."""
        x1, y1, x2, y2 = font(self.size).getbbox(self.text, anchor="mm", stroke_width=_STROKE)
        return (
            (self.x + x1, self.y + y1),
            (self.x + x2, self.y + y1),
            (self.x + x2, self.y + y2),
            (self.x + x1, self.y + y2),
        )


@dataclass(frozen=True)
class Scene:
    """The content of an image of `width` x `height` pixels, figures in raster order of their quarters."""

    width: int
    height: int
    background: tuple[int, int, int]
    figures: tuple[Figure, ...]
    texts: tuple[Lettering, ...]

    @property
    def digit(self) -> str:
        """The text of the first lettering."""
        return self.texts[0].text


def shape_scene(rng: Random, figures: int = 1) -> Scene:
    """Draw a scene of shapes that differ in shape and colour, and one digit.

    Every attribute is drawn uniformly and independently of the others, so that none tells another.
    """
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    *quarters, free = rng.sample(range(4), figures + 1)
    shapes, colors = rng.sample(SHAPES, figures), rng.sample(list(COLORS), figures)
    drawn = [
        Figure(
            shape,
            color,
            quarter,
            *_place(rng, quarter, width, height, _FIGURE_JITTER),
            radius=_radius(rng, width, height),
        )
        for shape, color, quarter in zip(shapes, colors, quarters, strict=True)
    ]
    digit = Lettering(
        rng.choice(DIGITS), *_place(rng, free, width, height, _DIGIT_JITTER), size=_font_size(width, height)
    )
    drawn.sort(key=lambda figure: figure.quarter)
    return Scene(width, height, rng.choice(_BACKGROUNDS), tuple(drawn), (digit,))


def text_scene(rng: Random) -> Scene:
    """Draw a scene of two numbers of one or two digits, one above the other."""
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    numbers = ("".join(rng.choices(DIGITS, k=rng.randint(1, 2))) for _ in range(2))
    lines = tuple(
        Lettering(number, width / 2, middle * height, _font_size(width, height))
        for number, middle in zip(numbers, (0.25, 0.75), strict=True)
    )
    return Scene(width, height, rng.choice(_BACKGROUNDS), (), lines)


def _place(rng: Random, quarter: int, width: int, height: int, jitter: float) -> tuple[float, float]:
    """Draw a point near the middle of a quarter."""
    column, row = quarter % 2, quarter // 2
    x, y = (0.25 + 0.5 * at + rng.uniform(-jitter, jitter) for at in (column, row))
    return x * width, y * height


def _radius(rng: Random, width: int, height: int) -> float:
    return rng.uniform(*_RADIUS) * min(width, height)


def _font_size(width: int, height: int) -> int:
    return round(_FONT_SIZE * min(width, height))


def draw(scene: Scene) -> Image.Image:
    """Draw the image of a scene, RGB."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    pen = ImageDraw.Draw(image)
    for figure in scene.figures:
        _draw_figure(pen, figure)
    for text in scene.texts:
        style: dict[str, Any] = {
            "fill": _INK,
            "font": font(text.size),
            "anchor": "mm",
            "stroke_width": _STROKE,
        }
        pen.text((text.x, text.y), text.text, **style)
    return image


def _draw_figure(pen: ImageDraw.ImageDraw, figure: Figure) -> None:
    """Draw a figure filled with its colour and outlined in white, so that form and colour are seen apart."""
    x1, y1, x2, y2 = figure.box
    style: dict[str, Any] = {"fill": COLORS[figure.color], "outline": _INK, "width": _OUTLINE}
    if figure.shape == "circle":
        pen.ellipse(figure.box, **style)
    elif figure.shape == "square":
        pen.rectangle(figure.box, **style)
    elif figure.shape == "triangle":
        pen.polygon([(figure.x, y1), (x2, y2), (x1, y2)], **style)
    else:
        pen.polygon(_star(figure), **style)


def _star(figure: Figure) -> list[tuple[float, float]]:
    """Return five points, alternating with the inner corners."""
    spokes = [(math.pi * k / 5, figure.radius * (0.45 if k % 2 else 1)) for k in range(10)]
    return [(figure.x + r * math.sin(a), figure.y - r * math.cos(a)) for a, r in spokes]


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Load Pillow's own scalable font, so that images do not depend on the machine."""
    loaded = ImageFont.load_default(size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow lacks FreeType, which draws the demo's text")
    return loaded
