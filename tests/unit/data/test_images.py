from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from megatron_qwenvl.data.errors import SampleError
from megatron_qwenvl.data.images import image_size, load_pixels

from .data_cases import png_image


def jpeg(width: int = 64, height: int = 48) -> bytes:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def absurd_png(width: int, height: int) -> bytes:
    """A PNG whose header promises a huge image."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_pixels_are_the_image_resized_straight_to_a_square() -> None:
    pixels = load_pixels(jpeg(), side=28, max_pixels=10_000)
    expected = Image.open(io.BytesIO(jpeg())).resize((28, 28), Image.Resampling.BICUBIC)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(buffer, "TIFF")
    pixels = load_pixels(buffer.getvalue(), side=2, max_pixels=100)
    assert pixels.shape == (3, 2, 2)
    assert (pixels == 255).all()


def test_size_comes_from_the_header() -> None:
    assert image_size(png_image(7, 5)) == (7, 5)
    assert image_size(absurd_png(9000, 9000)) == (9000, 9000)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a readable image"),
        (b"GIF89a nonsense", "not a readable image"),
        (jpeg()[:900], "cannot decode the image: .*truncated"),
        (png_image()[:-30], "cannot decode the image"),
        (absurd_png(9000, 9000), "9000x9000 has more than 50000000 pixels"),
        (absurd_png(100_000, 100_000), "exceeds limit"),
    ],
)
def test_a_bad_image_skips_its_sample(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        load_pixels(data, side=28, max_pixels=50_000_000)
