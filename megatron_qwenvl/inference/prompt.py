"""Prompt with image pixels, the input of the generator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """Tokens and image pixels of a prompt.

    Attributes:
        tokens: token ids, image slots included.
        image_starts: position of the first slot of each image.
        pixels: uint8 `[images, 3, S, S]` in the order of `image_starts`.
    """

    tokens: list[int]
    image_starts: list[int]
    pixels: Tensor
