"""Writing a sample: text, special tokens, images and coordinates to token ids with a loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_qwenvl.data.records.coordinates import box_corners, quad_corners, write_corners
from megatron_qwenvl.data.records.fields import Box, Quad

from .tokenizer import Tokenizer


@dataclass(frozen=True)
class ImageInfo:
    """An image as far as the text needs it: member name (`jpg`, `0.jpg`) and size in pixels."""

    name: str
    width: int
    height: int


@dataclass(frozen=True)
class RenderOptions:
    """How the records of a directory are rendered; chosen when it is indexed, and kept in its index.

    Attributes:
        unparsed_markup: a dialogue with an attempt at markup that does not parse is left out, or kept as text.
        ref_blank: whether the blank before a phrase of a grounded caption stands before `<ref>`, as in the paper, or
            inside, as the published model writes it.
    """

    unparsed_markup: Literal["leave_out", "keep"] = "leave_out"
    ref_blank: Literal["outside", "inside"] = "outside"

    def __str__(self) -> str:
        """The fields that are not the default: `ref_blank inside`."""
        default = RenderOptions()
        return ", ".join(
            f"{name} {value}" for name, value in vars(self).items() if value != getattr(default, name)
        )


DEFAULT_OPTIONS = RenderOptions()


@dataclass
class TokenizedSample:
    """A sample, or a prompt, as the decoder sees it.

    Attributes:
        tokens: ids; image slots hold `<imgpad>`.
        loss_mask: for each token, whether predicting it is part of the loss.
        image_starts: position of the first slot of each image.
        image_order: for each image in the order of appearance, its index in the given images.
    """

    tokens: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    image_starts: list[int] = field(default_factory=list)
    image_order: list[int] = field(default_factory=list)


class TokenBuilder:
    """Appends to a `TokenizedSample`; `supervised` says whether what is written belongs to the loss."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        images: Sequence[ImageInfo],
        image_tokens: int,
        language: str,
        options: RenderOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.tokenizer = tokenizer
        self.images = images
        self.image_tokens = image_tokens
        self.language = language
        self.options = options
        self.supervised = False
        self.out = TokenizedSample()

    def ids(self, ids: list[int], supervised: bool | None = None) -> None:
        self.out.tokens += ids
        self.out.loss_mask += [self.supervised if supervised is None else supervised] * len(ids)

    def text(self, text: str, supervised: bool | None = None) -> None:
        self.ids(self.tokenizer.encode(text), supervised)

    def image(self, index: int) -> None:
        """`<img>`, the slots, `</img>`; never learned."""
        tokenizer = self.tokenizer
        self.out.image_order.append(index)
        self.out.image_starts.append(len(self.out.tokens) + 1)
        slots = [tokenizer.img_pad] * self.image_tokens
        self.ids([tokenizer.img_start, *slots, tokenizer.img_end], supervised=False)

    def all_images(self) -> None:
        for index in range(len(self.images)):
            self.image(index)

    def ref(self, text: str) -> None:
        self.enclosed("ref", text)

    def boxes(self, boxes: Sequence[Box]) -> None:
        """Boxes in pixels of the only image."""
        image = self.images[0]
        for box in boxes:
            self.enclosed("box", write_corners(box_corners(box, image.width, image.height)))

    def quad(self, quad: Quad) -> None:
        """A quadrilateral in pixels of the only image."""
        image = self.images[0]
        self.enclosed("quad", write_corners(quad_corners(quad, image.width, image.height)))

    def enclosed(self, markup: Literal["ref", "box", "quad"], text: str) -> None:
        """`text` between a pair of grounding tokens."""
        start, end = self.tokenizer.markup[markup]
        self.ids([start])
        self.text(text)
        self.ids([end])
