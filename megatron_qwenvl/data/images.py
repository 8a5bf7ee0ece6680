"""Encoded pictures to pixels."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .errors import SampleError


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height from the header, without decoding.

    Raises:
        SampleError: not a picture.
    """
    with _open(data) as image:
        return image.size


def load_pixels(data: bytes, side: int, max_pixels: int) -> NDArray[np.uint8]:
    """Decode to RGB and resize straight to a square, bicubic, without a crop.

    Returns:
        uint8 `[3, side, side]`.

    Raises:
        SampleError: not a picture, damaged, truncated, or larger than `max_pixels` (found before decoding).
    """
    with _open(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise SampleError(f"picture of {width}x{height} has more than {max_pixels} pixels")
        try:
            square = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        except Exception as error:  # the decoders' exceptions have no common type
            raise SampleError(f"cannot decode the picture: {error}") from error
    return np.asarray(square).transpose(2, 0, 1)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except Exception as error:  # Pillow's own size guard, broken headers, unknown formats
        raise SampleError(f"not a readable picture: {error}") from error
