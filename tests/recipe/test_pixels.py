"""Pixels as the published code makes them: first to RGB, then resized; bicubic, straight to the square."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from megatron_qwenvl.data.images import load_pixels

SIDE = 28


def noise(mode: str) -> bytes:
    """A PNG of random colours stored in another mode."""
    rgb = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(rgb)
    buffer = io.BytesIO()
    (image.quantize(64) if mode == "P" else image.convert(mode)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["P", "1", "L", "RGB"])
def test_resizing_sees_colours_not_indices(mode: str) -> None:
    """Pillow resizes palettes and bits without interpolation, since a mean of two indices is no colour between them."""
    data = noise(mode)
    rgb = Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(
        load_pixels(data, SIDE, max_pixels=10_000), np.asarray(rgb).transpose(2, 0, 1)
    )
    if mode in ("P", "1"):  # the image can show the difference
        late = Image.open(io.BytesIO(data)).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
        assert np.abs(np.asarray(late).astype(int) - np.asarray(rgb)).mean() > 20
