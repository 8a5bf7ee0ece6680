"""Encoded images to pixels; every decision is listed with its reason in `docs/samples.md`."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin

from .errors import SampleError, describe_exception

IMAGE_FORMATS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"), "PNG": ("png",), "WEBP": ("webp",), "BMP": ("bmp",), "GIF": ("gif",),
    "TIFF": ("tif", "tiff"),
}  # fmt: skip
"""The decoders that may run, by Pillow's names, and the suffixes of their image members. The bytes decide which one
runs, not the suffix. None of them starts a program; others do (PostScript runs Ghostscript)."""

IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)

ALPHA = "alpha ignored: the colours below are shown"
ORIENTATION = "EXIF orientation ignored: pixels and boxes are as stored"
FRAMES = "several frames: the first is shown"
CMYK = "CMYK converted without its profile"
GREY16 = "grey of more than 8 bits reduced to 8"

# Pillow warns of large images, odd palettes and damaged metadata. All that is decided on here; and under `-W error`
# a warning would make an image unreadable. (`catch_warnings` per image would show other warnings again and again.)
warnings.filterwarnings("ignore", module=r"PIL\.")

_UNKNOWN_RANGE = {"I": "32-bit or signed integer grey", "F": "floating-point grey"}


@dataclass(frozen=True)
class ImageHeader:
    """Header of an image, read without decoding it.

    Attributes:
        width, height: pixels of the image as it is decoded.
        notes: why the decoded pixels may differ from those that another viewer shows.
    """

    width: int
    height: int
    notes: tuple[str, ...]


def read_image_header(data: bytes) -> ImageHeader:
    """Read size and notes from the header, without decoding.

    Raises:
        SampleError: not an image of `IMAGE_FORMATS`, damaged, or of values whose colours are unknown.
    """
    with _opened(data) as image:
        return ImageHeader(*image.size, notes=tuple(_notes(image)))


def image_size(data: bytes) -> tuple[int, int]:
    """Return width and height; errors as `read_image_header`."""
    header = read_image_header(data)
    return header.width, header.height


def load_pixels(data: bytes, side: int, max_pixels: int) -> NDArray[np.uint8]:
    """Decode the first frame to RGB and resize straight to a square, bicubic, without a crop.

    Returns:
        uint8 `[3, side, side]`.

    Raises:
        SampleError: see `read_image_header`; or damaged, truncated or larger than `max_pixels` (found before decoding).
    """
    with _opened(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise SampleError(f"image of {width}x{height} has more than {max_pixels} pixels")
        with _errors("cannot decode the image"):
            square = _to_rgb(image).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(square).transpose(2, 0, 1)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """Open an image and read its header; whatever Pillow makes of the header costs this image only."""
    with _errors("not a readable image"), Image.open(io.BytesIO(data), formats=tuple(IMAGE_FORMATS)) as image:
        _refuse_unknown_colours(image)
        yield image


@contextmanager
def _errors(problem: str) -> Iterator[None]:
    """Turn every exception into a SampleError: those of the decoders have no common type."""
    try:
        yield
    except SampleError:
        raise
    except Image.UnidentifiedImageError:  # its own message holds an address
        raise SampleError(f"{problem}: no valid header of {', '.join(IMAGE_FORMATS)}") from None
    except Exception as error:  # Pillow's own size guard, broken headers, a decoder's assertion
        raise SampleError(f"{problem}: {str(error)[:200] or describe_exception(error)}") from error


def _refuse_unknown_colours(image: Image.Image) -> None:
    if image.mode in ("P", "PA") and image.palette is None:  # Pillow would show black, or end in an assertion
        raise SampleError("palette image without a palette: its colours are unknown")
    if image.mode in _UNKNOWN_RANGE:
        raise SampleError(f"{_UNKNOWN_RANGE[image.mode]} image: which values are black and white is unknown")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB as Pillow and the published code do, except for grey of more than 8 bits.

    Of that Pillow makes every value above 255 white.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray(_upper_byte(image)).convert("RGB")
    return image.convert("RGB")


def _upper_byte(image: Image.Image) -> NDArray[np.uint8]:
    """Take the upper 8 bits of unsigned grey, as Pillow does of 16-bit colours, `[height, width]`."""
    bits, white_is_zero = 16, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        (bits,) = image.tag_v2[TiffImagePlugin.BITSPERSAMPLE]
        white_is_zero = image.tag_v2[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] == 0
    grey = (np.asarray(image).astype(np.uint16) >> (bits - 8)).astype(np.uint8)
    return 255 - grey if white_is_zero else grey


def _notes(image: Image.Image) -> Iterator[str]:
    if image.has_transparency_data:
        yield ALPHA
    # A TIFF has its own tag, which its decoder obeys; EXIF behind the pixels of a PNG is not known yet.
    if "exif" in image.info and _orientation(image) not in (None, 0, 1):
        yield ORIENTATION
    if _has_frames(image):
        yield FRAMES
    if image.mode == "CMYK":
        yield CMYK
    if image.mode.startswith("I;16"):
        yield GREY16


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF is no reason to leave an image out
        return None


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second frame does not touch the first
        return False
