"""The text and the images among the files of a sample, and the order of the images."""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Callable, Sequence

from megatron_qwenvl.data.errors import SampleError
from megatron_qwenvl.data.images import IMAGE_SUFFIXES

from .media import STARTS_WITHIN, begins_like_media, has_media_suffix, without_compression
from .samples import ShardSample
from .tar import Member

_TEXT_SUFFIXES = ("json", "txt")
GAP = "a number is missing before this image: another may be lost"


def text_suffix(sample: ShardSample, read: Callable[[Member], bytes]) -> str:
    """Find the suffix of the record with a task (`json`), or of the caption as img2dataset writes it (`txt`)."""
    found = {suffix.lower(): suffix for suffix in sample.members if suffix.lower() in _TEXT_SUFFIXES}
    if "json" not in found and "txt" not in found:
        raise SampleError(f"neither .json nor .txt, only {', '.join(sample.members)}")
    if "txt" not in found:
        return found["json"]
    try:
        record = json.loads(read(sample.members[found["json"]])) if "json" in found else {}
    except (ValueError, RecursionError) as error:
        raise SampleError(f"malformed json: {error}") from error
    has_task = isinstance(record, dict) and record.get("task") is not None
    return found["json"] if has_task else found["txt"]


def _is_text(name: str) -> bool:
    return name.lower().rpartition(".")[2] in _TEXT_SUFFIXES


def _is_image(name: str) -> bool:
    return name.lower().rpartition(".")[2] in IMAGE_SUFFIXES


def refuse_other_media(sample: ShardSample, read: Callable[[Member], bytes]) -> None:
    """Leave out a sample with an image or a text that would not be seen; other files (`cls`, `npy`, `xml`) do not
    matter.

    Raises:
        SampleError: a file with the suffix or the first bytes of an image, a film or sound, or a compressed one.
    """
    for name, member in sample.members.items():
        if _is_image(name) or name.lower() in _TEXT_SUFFIXES:
            continue
        plain = without_compression(name)
        if plain != name and (_is_image(plain) or _is_text(plain) or has_media_suffix(plain)):
            raise SampleError(f"a compressed image or text: .{name}")
        start = read(Member(member.offset, min(member.size, STARTS_WITHIN)))
        if has_media_suffix(name) or begins_like_media(start):
            raise SampleError(f"unknown kind of image: .{name}")


def image_names(sample: ShardSample, ordered: bool) -> list[str]:
    """List the image files in the order of their numbers, whatever their suffixes.

    Raises:
        SampleError: two images with one place, and their order matters.
    """
    names = sorted(filter(_is_image, sample.members), key=lambda name: (_place(name), name))
    for first, second in itertools.pairwise(names):
        if ordered and _place(first) == _place(second):
            raise SampleError(f"which image comes first is not clear: {first}, {second}")
    return names


def images_behind_gaps(names: Sequence[str]) -> list[str]:
    """List the images before whose number another is missing, as after a lost file: `2.jpg` after `0.jpg`.

    Args:
        names: images in their order.
    """
    found, last = [], {"#": 0}  # numbers alone begin with 0 or 1, those in words (`page9`) anywhere
    for name in names:
        stem = name.rpartition(".")[0]
        match = re.fullmatch(r"([^0-9]*)([0-9]{1,18})([^0-9]*)", stem)
        if match:
            series, number = f"{match[1]}#{match[3]}", int(match[2])
            if number > last.get(series, number) + 1:
                found.append(name)
            last[series] = number
        elif not stem:  # `jpg`, then `1.jpg` or `2.jpg`
            last["#"] = 1
    return found


def _place(name: str) -> list[tuple[int, int, str]]:
    """Make a sort key: numbers by value, words by length first.

    It sorts `jpg`, `2.png`, `10.jpg`, and `a.jpg`, `b.jpg`, `aa.jpg`.
    """
    parts = re.findall(r"[0-9]+|[^0-9]+", name.rpartition(".")[0])
    return [
        (0, int(part[:18]), part[18:]) if part[0] in string.digits else (1, len(part), part) for part in parts
    ]
