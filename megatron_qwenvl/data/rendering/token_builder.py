"""Token ids and loss mask of a sample, built from text, special tokens, images and coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_qwenvl.data.records.coordinates import box_corners, quad_corners, write_corners
from megatron_qwenvl.data.records.fields import Box, Quad

from .tokenizer import Tokenizer


@dataclass(frozen=True)
class ImageInfo:
    """Name (`jpg`, `0.jpg`) and size in pixels of an image: all that its text depends on."""

    name: str
    width: int
    height: int


@dataclass(frozen=True)
class RenderOptions:
    """Options for rendering the records of a directory; chosen when it is indexed, and kept in its index.

    Attributes:
        unparsed_markup: leave out a dialogue with text that looks like markup and does not parse, or keep it as text.
        ref_blank: write the blank before a phrase of a grounded caption before `<ref>`, as in the paper, or inside, as
            the published model writes it.
    """

    unparsed_markup: Literal["leave_out", "keep"] = "leave_out"
    ref_blank: Literal["outside", "inside"] = "outside"

    def __str__(self) -> str:
        """Name the fields that differ from the default: `ref_blank inside`."""
        default = RenderOptions()
        return ", ".join(
            f"{name} {value}" for name, value in vars(self).items() if value != getattr(default, name)
        )


DEFAULT_OPTIONS = RenderOptions()


@dataclass
class TokenizedSample:
    """A sample, or a prompt, as the decoder reads it.

    Attributes:
        tokens: token ids; image slots hold `<imgpad>`.
        loss_mask: for each token, whether predicting it is part of the loss.
        image_starts: position of the first slot of each image.
        image_order: for each image in the order of appearance, its index in the given images.
    """

    tokens: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    image_starts: list[int] = field(default_factory=list)
    image_order: list[int] = field(default_factory=list)


class TokenBuilder:
    """Appends to a `TokenizedSample`.

    `supervised` says whether the tokens that follow belong to the loss; a single call may say otherwise.

    Args:
        tokenizer: the vocabulary.
        images: the sample's images.
        image_tokens: slots of one image.
        language: of the caption prompt where a record does not name its own.
        options: how records are rendered where there is a choice.
    """

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
        self.sample = TokenizedSample()

    def ids(self, ids: list[int], supervised: bool | None = None) -> None:
        """Append token ids."""
        self.sample.tokens += ids
        self.sample.loss_mask += [self.supervised if supervised is None else supervised] * len(ids)

    def text(self, text: str, supervised: bool | None = None) -> None:
        """Append text, in which nothing becomes a special token."""
        self.ids(self.tokenizer.encode(text), supervised)

    def image(self, index: int) -> None:
        """Append `<img>`, the slots of an image, and `</img>`; never supervised."""
        tokenizer = self.tokenizer
        self.sample.image_order.append(index)
        self.sample.image_starts.append(len(self.sample.tokens) + 1)
        slots = [tokenizer.img_pad] * self.image_tokens
        self.ids([tokenizer.img_start, *slots, tokenizer.img_end], supervised=False)

    def all_images(self) -> None:
        """Append every image in its order."""
        for index in range(len(self.images)):
            self.image(index)

    def ref(self, text: str) -> None:
        """Append a phrase between `<ref>` and `</ref>`."""
        self.enclosed("ref", text)

    def boxes(self, boxes: Sequence[Box]) -> None:
        """Append boxes that are given in pixels of the only image."""
        image = self.images[0]
        for box in boxes:
            self.enclosed("box", write_corners(box_corners(box, image.width, image.height)))

    def quad(self, quad: Quad) -> None:
        """Append a quadrilateral that is given in pixels of the only image."""
        image = self.images[0]
        self.enclosed("quad", write_corners(quad_corners(quad, image.width, image.height)))

    def enclosed(self, markup: Literal["ref", "box", "quad"], text: str) -> None:
        """Append `text` between a pair of grounding tokens."""
        start, end = self.tokenizer.markup[markup]
        self.ids([start])
        self.text(text)
        self.ids([end])
