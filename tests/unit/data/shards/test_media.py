"""Files that show something and are not read are known, by their suffix or by their first bytes."""

from __future__ import annotations

import io
import mimetypes
import random
import struct

import pytest
from PIL import Image

from megatron_qwenvl.data.images import IMAGE_FORMATS, IMAGE_SUFFIXES
from megatron_qwenvl.data.shards.media import (
    STARTS_WITHIN,
    begins_like_media,
    has_media_suffix,
    without_compression,
)
from megatron_qwenvl.data.shards.members import images_behind_gaps

DATA = {"h5", "hdf", "grib", "bufr", "ass"}  # arrays, weather, subtitles: registered, and shown by nothing
WITHOUT_MARK = {"TGA", "SPIDER", "PALM"}  # their first bytes may be anything


def test_every_suffix_that_pillow_or_python_take_for_an_image_a_film_or_sound_is_known() -> None:
    kinds = mimetypes.MimeTypes(filenames=()).types_map
    types = {suffix: kind for known in kinds for suffix, kind in known.items()}
    suffixes = {s for s, kind in types.items() if kind.startswith(("image/", "video/", "audio/"))}
    suffixes |= set(Image.registered_extensions())
    assert len(suffixes) > 80
    unknown = {s[1:] for s in suffixes if s[1:] not in IMAGE_SUFFIXES and not has_media_suffix(s[1:].upper())}
    assert unknown - DATA == set()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "F"])
def test_every_format_that_pillow_writes_is_known_by_its_first_bytes(mode: str) -> None:
    image = Image.effect_noise((24, 16), 90).convert("RGB").convert(mode)
    Image.init()
    found = set()
    for kind in sorted(set(Image.SAVE) - WITHOUT_MARK):
        buffer = io.BytesIO()
        try:
            image.save(buffer, kind)
        except (OSError, ValueError, KeyError):  # the format has no such images
            continue
        found.add(kind)
        assert begins_like_media(buffer.getvalue()[:STARTS_WITHIN]), kind
    assert mode != "RGB" or found > {*IMAGE_FORMATS, "PPM", "EPS", "PDF", "ICO", "DDS", "SGI"}


@pytest.mark.parametrize(
    "start",
    [
        b"qoif" + bytes(40), b"8BPS" + bytes(40), b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\x4f\xff\x51" + bytes(9),
        b"II\xbc\x01" + bytes(9), b"II+\0" + bytes(9), b"MM\0+" + bytes(9), b"\xd7\xcd\xc6\x9a" + bytes(40),
        b"\x1a\x45\xdf\xa3", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", b"\0\0\0\x18ftypheic", b"\0\0\0\x18ftyp3gp4",
        b"OggS\0", b"fLaC\0", b"ID3\x03\0", b"RIFF\0\0\0\0AVI LIST", b"Pf\n1 1\n-1.0\n",
        b"P6 # made by hand\n1 1\n255\nabc",
        b"<svg xmlns='x'>", b"<?xml version='1.0'?>\n<!-- drawn -->\n<svg>", b"#define im_width 16\n",
        b"/9j/4AAQSkZJRg", b"iVBORw0KGgoAAAANSU", b"FLV\x01\x05", b"\0\0\x01\xba\x44", (b"G" + bytes(187)) * 2 + b"G",
    ],
)  # fmt: skip
def test_other_kinds_are_known_by_their_first_bytes(start: bytes) -> None:
    assert begins_like_media(start)


@pytest.mark.parametrize(
    "start",
    [b"", b"7", b"BMW 3 series 1234567890 abcdefgh", b"P1 is a class", b"\x93NUMPY\x01\0v\0{'descr'", b'{"a": 1}',
     b"[1, 2]", b"a cat", b"\x1f\x8b\x08", b"PK\x03\x04", b"<annotation><svg/>",
     struct.pack("<4q", 1, 2, 3, 4), struct.pack("<4i", 0, 1, 2, 3),
     struct.pack("<4f", 0.5, -1, 2, 0), struct.pack(">4q", 4, 5, 6, 7), "中文".encode(), b"\xef\xbb\xbftext"],
)  # fmt: skip
def test_other_files_are_not_taken_for_images(start: bytes) -> None:
    assert not begins_like_media(start)


def test_random_bytes_are_hardly_ever_taken_for_an_image() -> None:
    rng = random.Random(0)
    assert sum(begins_like_media(rng.randbytes(STARTS_WITHIN)) for _ in range(5000)) < 5


def test_suffixes_below_compression() -> None:
    names = ["jpg.gz", "0.jpg.gz.xz", "json.ZST", "gz", "npy", "tar.gz"]
    assert [without_compression(name) for name in names] == ["jpg", "0.jpg", "json", "gz", "npy", "tar"]


@pytest.mark.parametrize(
    ("names", "behind_gaps"),
    [
        (["0.jpg", "1.png", "2.jpg"], []),
        (["1.jpg", "2.jpg"], []),
        (["1.jpg"], []),
        (["jpg", "1.jpg"], []),
        (["jpg", "2.jpg", "3.jpg"], []),
        (["page9.jpg", "page10.jpg"], []),
        (["a.jpg", "c.jpg"], []),
        (["00.jpg", "01.jpg"], []),
        (["0.jpg", "2.jpg"], ["2.jpg"]),
        (["2.jpg"], ["2.jpg"]),
        (["1.jpg", "9.jpg", "10.jpg", "20.jpg"], ["9.jpg", "20.jpg"]),
        (["jpg", "3.jpg"], ["3.jpg"]),
        (["page9.jpg", "page11.jpg"], ["page11.jpg"]),
    ],
)
def test_a_gap_in_the_numbers_of_images_is_seen(names: list[str], behind_gaps: list[str]) -> None:
    assert images_behind_gaps(names) == behind_gaps
