"""Writing a sample: text, special tokens, pictures and coordinates to token ids with a loss mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .errors import SampleError
from .tasks import Box, Point, Quad
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class ImageInfo:
    """A picture as far as the text needs it: member name (`jpg`, `0.jpg`) and size in pixels."""

    name: str
    width: int
    height: int


@dataclass
class Rendered:
    """A sample, or a prompt, as the decoder sees it.

    Attributes:
        tokens: ids; image slots hold `<imgpad>`.
        learned: for each token, whether predicting it is part of the loss.
        image_starts: position of the first slot of each picture.
        image_order: for each picture in the order of appearance, its index in the given pictures.
    """

    tokens: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    image_starts: list[int] = field(default_factory=list)
    image_order: list[int] = field(default_factory=list)


class Writer:
    """Appends to a `Rendered`; `learn` says whether what is written belongs to the loss."""

    def __init__(
        self, tokenizer: Tokenizer, images: Sequence[ImageInfo], image_tokens: int, language: str
    ) -> None:
        self.tokenizer = tokenizer
        self.images = images
        self.image_tokens = image_tokens
        self.language = language
        self.learn = False
        self.out = Rendered()

    def ids(self, ids: list[int], learn: bool | None = None) -> None:
        self.out.tokens += ids
        self.out.learned += [self.learn if learn is None else learn] * len(ids)

    def text(self, text: str, learn: bool | None = None) -> None:
        self.ids(self.tokenizer.encode(text), learn)

    def image(self, index: int) -> None:
        """`<img>`, the slots, `</img>`; never learned."""
        tokenizer = self.tokenizer
        self.out.image_order.append(index)
        self.out.image_starts.append(len(self.out.tokens) + 1)
        slots = [tokenizer.img_pad] * self.image_tokens
        self.ids([tokenizer.img_start, *slots, tokenizer.img_end], learn=False)

    def all_images(self) -> None:
        for index in range(len(self.images)):
            self.image(index)

    def ref(self, text: str) -> None:
        self.enclosed("ref", text)

    def boxes(self, boxes: Sequence[Box]) -> None:
        """Boxes in pixels of the only picture."""
        for box in boxes:
            self.enclosed("box", _corners(_box_points(box, self.images[0]), self.images[0]))

    def quad(self, quad: Quad) -> None:
        """A quadrilateral in pixels of the only picture."""
        self.enclosed("quad", _corners(quad, self.images[0]))

    def enclosed(self, markup: Literal["ref", "box", "quad"], text: str) -> None:
        """`text` between a pair of grounding tokens."""
        start, end = self.tokenizer.markup[markup]
        self.ids([start])
        self.text(text)
        self.ids([end])


def _box_points(box: Box, image: ImageInfo) -> list[Point]:
    """Top-left and bottom-right of a box in pixels that overlaps the picture."""
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2 and x2 > 0 and y2 > 0 and x1 < image.width and y1 < image.height):
        raise SampleError(f"box {box} is empty or outside of the {image.width}x{image.height} picture")
    return [(x1, y1), (x2, y2)]


def normalise(point: Point, width: int, height: int) -> tuple[int, int]:
    """Pixels to integers in [0, 1000): floor(1000 x / width), what lies outside moved to the border."""
    x, y = (
        min(max(math.floor(1000 * at / size), 0), 999)
        for at, size in zip(point, (width, height), strict=True)
    )
    return x, y


def _corners(points: Sequence[Point], image: ImageInfo) -> str:
    """`(x,y),(x,y)..` in the model's coordinates."""
    normalised = (normalise(point, image.width, image.height) for point in points)
    return ",".join(f"({x},{y})" for x, y in normalised)
