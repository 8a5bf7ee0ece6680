"""One decision for each kind of image, and only the allowed decoders."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from megatron_qwenvl.data.errors import SampleError
from megatron_qwenvl.data.images import (
    ALPHA,
    CMYK,
    FRAMES,
    GREY16,
    ORIENTATION,
    ImageHeader,
    load_pixels,
    read_image_header,
)
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer
from megatron_qwenvl.data.shards.index_builder import build_index

from .data_cases import png_image, sample, write_shard

RED, GREEN = (250, 10, 10), (10, 250, 10)
RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
SCALED = [0, 65, 130, 195, 255]
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 30\n%%EndComments\nshowpage\n%%EOF\n"


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def centre(data: bytes) -> list[int]:
    return load_pixels(data, side=8, max_pixels=10_000_000)[:, 4, 4].tolist()


def close(found: list[int], expected: tuple[int, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 6


def patched(tiff: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with another value of a SHORT tag."""
    at = tiff.index(struct.pack("<HHI", tag, 3, 1)) + 8
    return tiff[:at] + struct.pack("<H", value) + tiff[at + 2 :]


WHITE_IS_ZERO = patched(encode(Image.fromarray(RAMP), "TIFF"), 262, 0)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(Image.fromarray(RAMP), "PNG"), SCALED),
        (encode(Image.fromarray(RAMP), "TIFF"), SCALED),
        (encode(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"), SCALED),
        (encode(Image.fromarray(RAMP.astype(">u2")), "TIFF"), SCALED),
        (WHITE_IS_ZERO, [255 - grey for grey in SCALED]),
    ],
    ids=["png", "tiff", "compressed", "big-endian", "white is zero"],
)
def test_grey_of_16_bits_is_scaled_not_clipped(data: bytes, expected: list[int]) -> None:
    pixels = load_pixels(data, side=64, max_pixels=10_000)
    assert pixels[0, 32, [0, 16, 32, 48, 63]].tolist() == expected
    assert (pixels == pixels[:1]).all()
    assert GREY16 in read_image_header(data).notes


def test_grey_of_12_bits_is_scaled_by_its_own_range() -> None:
    values = [0, 0x400, 0x800, 0xFFF]
    packed = bytes.fromhex("".join(f"{value:03x}" for value in values)) * 4
    fields = [
        (256, 4),
        (257, 4),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 4),
        (279, len(packed)),
    ]
    directory = struct.pack("<H", len(fields)) + b"".join(
        struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in fields
    )
    data = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory + bytes(4)
    assert load_pixels(data, side=4, max_pixels=100)[0, 0].tolist() == [value >> 4 for value in values]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (RAMP.astype(np.int32), "32-bit or signed integer grey"),
        (RAMP / np.float32(65535), "floating-point grey"),
    ],
)
def test_grey_of_unknown_range_is_refused_by_name(array: Any, reason: str) -> None:
    data = encode(Image.fromarray(array), "TIFF")
    for look in (read_image_header, centre):
        with pytest.raises(SampleError, match=f"{reason} image: which values are black and white is unknown"):
            look(data)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_below_alpha_the_stored_colours_are_shown(mode: str) -> None:
    """As the published code does, however the transparency is stored."""
    colour = (200, 200, 200)
    if mode == "P":
        data = encode(Image.new("RGB", (8, 8), colour).quantize(4), "PNG", transparency=0)
    else:
        data = encode(
            Image.new("RGBA", (8, 8), (*colour, 0)).convert(mode), "TIFF" if mode == "PA" else "PNG"
        )
    assert close(centre(data), colour)
    assert read_image_header(data).notes == (ALPHA,)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_changes_neither_size_nor_pixels(kind: str) -> None:
    image = Image.new("RGB", (40, 20), RED)
    image.paste(GREEN, (0, 0, 20, 20))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(image, kind, exif=exif)
    header = read_image_header(data)
    assert (header.width, header.height, header.notes) == (40, 20, (ORIENTATION,))
    pixels = load_pixels(data, side=8, max_pixels=1000)
    assert close(pixels[:, 6, 1].tolist(), GREEN) and close(pixels[:, 1, 6].tolist(), RED)
    exif[0x0112] = 1
    assert read_image_header(encode(image, kind, exif=exif)).notes == ()


def test_size_and_pixels_of_a_turned_tiff_agree() -> None:
    """Orientation is a part of TIFF itself, and its decoder turns the image; so must the size be."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(GREEN, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(image, "TIFF", exif=exif)
    assert read_image_header(data) == ImageHeader(20, 40, notes=())
    pixels = load_pixels(data, side=8, max_pixels=1000)
    assert close(pixels[:, 1, 6].tolist(), GREEN) and close(pixels[:, 6, 1].tolist(), RED)


def test_red_of_four_inks_stays_red() -> None:
    for kind in ("JPEG", "TIFF"):
        data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind)
        assert close(centre(data), (255, 0, 0)), kind
        assert read_image_header(data).notes == (CMYK,)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_of_several_frames_is_shown(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert close(centre(data), RED)
    assert FRAMES in read_image_header(data).notes


def test_a_colour_profile_changes_nothing() -> None:
    image = Image.new("RGB", (8, 8), RED)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for kind in ("PNG", "WEBP"):
        assert close(centre(encode(image, kind, icc_profile=profile, lossless=True)), RED)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_plain_images_have_no_notes(mode: str) -> None:
    assert read_image_header(encode(Image.new(mode, (8, 8)), "PNG")).notes == ()


def test_no_program_is_started_on_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = tmp_path / "called"
    for name in ("gs", "gswin32c", "djpeg", "ppmquant"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} >> {called}\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for look in (read_image_header, centre):
        with pytest.raises(SampleError, match="no valid header of JPEG, PNG, WEBP, BMP, GIF, TIFF"):
            look(POSTSCRIPT)
    assert not called.exists()


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "ICO", "JPEG2000", "AVIF", "PCX", "SGI", "DDS", "PDF"])
def test_other_formats_are_refused_whatever_their_name(kind: str) -> None:
    data = encode(Image.new("RGB", (16, 16), RED), kind)
    for look in (read_image_header, centre):
        with pytest.raises(SampleError, match="not a readable image: no valid header of JPEG"):
            look(data)


def test_an_image_without_pixels_is_refused() -> None:
    data = b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\x02\0;"
    with pytest.raises(SampleError, match="no valid header"):
        read_image_header(data)


def test_warnings_neither_print_nor_refuse(tmp_path: Path) -> None:
    """Pillow warns of large images and odd palettes; `python -W error` would make samples of them unreadable."""
    large, odd = tmp_path / "large.png", tmp_path / "odd.png"
    large.write_bytes(encode(Image.new("1", (10_000, 9_000)), "PNG"))
    odd.write_bytes(encode(Image.new("P", (4, 4)), "PNG", transparency=bytes([0, 128])))
    code = (
        "import sys; from pathlib import Path; from megatron_qwenvl.data.images import load_pixels, read_image_header\n"
        "for data in map(Path.read_bytes, map(Path, sys.argv[1:])):\n"
        "    print(read_image_header(data).width, load_pixels(data, 2, 10**8).shape)"
    )
    for options in ([], ["-W", "error"]):
        command = [sys.executable, *options, "-c", code, str(large), str(odd)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("10000 (3, 2, 2)\n4 (3, 2, 2)\n", "")


@pytest.mark.parametrize("chunk", [b"zTXtk\0\0", b"iTXtk\0\1\0\0\0", b"iCCPk\0\0"])
def test_a_compressed_chunk_is_not_unpacked_without_end(chunk: bytes) -> None:
    body = chunk + zlib.compress(bytes(50_000_000))
    bomb = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    plain = encode(Image.new("RGB", (8, 8), RED), "PNG")
    with pytest.raises(SampleError, match="not a readable image: Decompressed data too large"):
        read_image_header(plain[:33] + bomb + plain[33:])


def png_of_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    encoded = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(encoded)


WITHOUT_PALETTE = png_of_chunks(
    (b"IHDR", struct.pack(">IIBBBBB", 4, 2, 4, 3, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0\x1b\x22" * 2)), (b"IEND", b"")
)  # fmt: skip


def test_a_palette_image_without_its_palette_costs_its_sample_alone(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    """Pillow asserts that there is one where it looks for transparency."""
    for look in (read_image_header, centre):
        with pytest.raises(SampleError, match="^palette image without a palette"):
            look(WITHOUT_PALETTE)
    record = {"task": "caption", "caption": "x"}
    samples = [sample("bad", record, png=WITHOUT_PALETTE), sample("good", record, png=png_image())]
    index = build_index(write_shard(tmp_path / "s.tar", samples), byte_level)
    assert [index.key(row) for row in range(len(index))] == ["good"]
    assert index.arrays["skipped_reasons"].tolist() == [
        b"png: palette image without a palette: its colours are unknown"
    ]


@pytest.mark.parametrize("where", ["has_transparency_data", "mode", "convert", "resize", "size"])
@pytest.mark.parametrize(
    "kind", [AssertionError, OSError, SyntaxError, struct.error, zlib.error, MemoryError]
)
def test_no_exception_of_the_image_library_gets_out(
    monkeypatch: pytest.MonkeyPatch, where: str, kind: type[Exception]
) -> None:
    """Wherever it is raised: while the header is read, described or the pixels are decoded."""

    def fail(*_: object) -> None:
        raise kind("broken")

    data = encode(Image.new("RGB", (8, 8), RED), "PNG")
    method = where in ("convert", "resize")
    monkeypatch.setattr(Image.Image, where, fail if method else property(fail, lambda image, value: None))
    with pytest.raises(SampleError, match="^(not a readable|cannot decode the) image: "):
        centre(data) if method or where == "mode" else read_image_header(data)


@pytest.mark.filterwarnings("ignore")
def test_hundreds_of_damaged_images_are_decoded_or_refused() -> None:
    """Whatever the damage is, nothing but SampleError comes out of the image library."""
    rng = random.Random(7)
    rgb = Image.effect_noise((24, 16), 90).convert("RGB")
    palette, exif = rgb.quantize(16), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    originals = [
        encode(rgb, "JPEG", exif=exif), encode(rgb.convert("CMYK"), "JPEG"), encode(rgb, "PNG"),
        encode(palette, "PNG", transparency=3), encode(palette, "PNG"), encode(rgb, "WEBP", exif=exif),
        encode(palette, "GIF", save_all=True, append_images=[palette], transparency=1), encode(palette, "BMP"),
        encode(rgb, "TIFF", compression="tiff_lzw"), encode(Image.fromarray(RAMP), "TIFF"), WITHOUT_PALETTE,
    ]  # fmt: skip
    refused = 0
    for number in range(440):
        data = bytearray(originals[number % len(originals)])
        for _ in range(rng.choice((0, 1, 1, 4))):
            at = rng.randrange(min(len(data), rng.choice((64, 200, len(data)))))
            if rng.random() < 0.6:
                data[at] = rng.choice((0, 1, 128, 255, rng.randrange(256)))
            elif rng.random() < 0.5:
                data[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"))
            else:
                del data[at : at + rng.randrange(1, 20)]
                data = data or bytearray(b"x")
        try:
            read_image_header(bytes(data))
            load_pixels(bytes(data), side=2, max_pixels=10**6)
        except SampleError as error:
            assert len(str(error)) < 300
            refused += 1
    assert 40 < refused < 400


@pytest.mark.filterwarnings("ignore")  # pytest undoes the package's own filter
def test_damaged_exif_does_not_refuse_an_image() -> None:
    data = encode(Image.new("RGB", (8, 8), RED), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_image_header(data).notes == ()
