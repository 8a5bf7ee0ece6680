"""Which files of a sample are its text and its images, and in which order the images come."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable

from .errors import SampleError
from .images import IMAGE_SUFFIXES
from .shards import ShardSample
from .tar import Member

_TEXT_SUFFIXES = ("json", "txt")
_OTHER_MEDIA = tuple(
    "apng avif heic heif jp2 j2k jpx jxl svg ico icns ppm pgm pbm pnm tga psd eps ps pdf raw dng cr2 nef arw hdr exr "
    "dds pcx xcf mp4 m4v webm avi mov mkv mpg mpeg mp3 wav flac ogg".split()
)
"""Suffixes of what a sample may show and this package does not read."""
_IMAGE_STARTS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|II\*\0|MM\0\*|....ftyp|....jP  |\xff\x0a", re.DOTALL
)


def text_suffix(sample: ShardSample, read: Callable[[Member], bytes]) -> str:
    """The suffix of the record with a task (`json`), or of the caption as img2dataset writes it (`txt`)."""
    found = {suffix.lower(): suffix for suffix in sample.members if suffix.lower() in _TEXT_SUFFIXES}
    if "json" not in found and "txt" not in found:
        raise SampleError(f"neither .json nor .txt, only {', '.join(sample.members)}")
    if "txt" not in found:
        return found["json"]
    try:
        record = json.loads(read(sample.members[found["json"]])) if "json" in found else None
    except (ValueError, RecursionError) as error:
        raise SampleError(f"malformed json: {error}") from error
    return found["json"] if isinstance(record, dict) and "task" in record else found["txt"]


def _is_image(name: str) -> bool:
    return name.lower().rpartition(".")[2] in IMAGE_SUFFIXES


def refuse_other_media(sample: ShardSample, read: Callable[[Member], bytes]) -> None:
    """Leave out a sample with an image that would not be seen; other files (`cls`, `npy`, `xml`) do not matter.

    Raises:
        SampleError: a file with the suffix or the first bytes of an image or a film.
    """
    for name, member in sample.members.items():
        if _is_image(name) or name.lower() in _TEXT_SUFFIXES:
            continue
        start = read(Member(member.offset, min(member.size, 16)))
        if name.lower().rpartition(".")[2] in _OTHER_MEDIA or _IMAGE_STARTS.match(start):
            raise SampleError(f"unknown kind of image: .{name}")


def image_names(sample: ShardSample, ordered: bool) -> list[str]:
    """Image members in the order of their numbers, whatever their suffixes.

    Raises:
        SampleError: two images with one place, and their order matters.
    """
    names = sorted(filter(_is_image, sample.members), key=lambda name: (_place(name), name))
    for first, second in itertools.pairwise(names):
        if ordered and _place(first) == _place(second):
            raise SampleError(f"which image comes first is not clear: {first}, {second}")
    return names


def _place(name: str) -> list[tuple[int, int, str]]:
    """Sorts `jpg`, `2.png`, `10.jpg`, and `a.jpg`, `b.jpg`, `aa.jpg`: numbers by value, words by length first."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.rpartition(".")[0])
    return [(0, int(part[:18]), part[18:]) if part[0].isdigit() else (1, len(part), part) for part in parts]
