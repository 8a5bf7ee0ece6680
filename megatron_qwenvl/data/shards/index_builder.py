"""The index of one shard, built by reading the shard once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qwenvl.data.errors import DataError, SampleError, only_this_sample
from megatron_qwenvl.data.images import load_pixels, read_image_header
from megatron_qwenvl.data.records.dialogues import Chat
from megatron_qwenvl.data.records.tasks import TASKS, decode_record
from megatron_qwenvl.data.rendering.renderer import Renderer
from megatron_qwenvl.data.rendering.token_builder import DEFAULT_OPTIONS, ImageInfo, RenderOptions
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer

from .index import COLUMNS, ShardIndex, file_digest
from .members import GAP, image_names, images_behind_gaps, refuse_other_media, text_suffix
from .samples import ShardSample, checksum, read_member, scan_shard
from .tar import Member

JOINT = "another tar begins here: joined by cat, or the part before was overwritten with zeros"
_MAX_REASON = 300
_MAX_KEY = 1000

Columns = dict[str, list[Any]]


def build_index(
    path: Path, tokenizer: Tokenizer, verify_images: bool = False, options: RenderOptions = DEFAULT_OPTIONS
) -> ShardIndex:
    """Read a shard once from end to end.

    A sample that cannot be used is recorded with its reason.

    Args:
        path: the tar.
        tokenizer: counts the tokens of the text.
        verify_images: decode every image instead of reading its header only.
        options: how records are rendered where there is a choice.

    Raises:
        DataError: the shard cannot be read, is damaged, or changes meanwhile.
    """
    columns: Columns = {name: [] for name in COLUMNS}
    columns["image_first"].append(0)
    renderer = Renderer(tokenizer, image_tokens=0, options=options)
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise DataError(f"{path}: cannot read the shard: not a file")
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            digest = file_digest(file)
            read = _reader(file.fileno(), path)
            joints: list[int] = []
            for sample in scan_shard(file, path, joints):
                _add_or_skip(columns, sample, read, renderer, verify_images)
            columns["noted_keys"] += [f"byte {at}".encode() for at in joints]
            columns["notes"] += [JOINT.encode()] * len(joints)
            now = os.fstat(file.fileno())
            if (now.st_size, now.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                raise DataError(f"{path}: changed while it was indexed; index it when it is complete")
    except OSError as error:
        raise DataError(f"{path}: cannot read the shard: {error.strerror}") from error
    arrays = {name: np.array(values, dtype=COLUMNS[name]) for name, values in columns.items()}
    return ShardIndex(
        path.name,
        stat.st_size,
        stat.st_mtime_ns,
        digest,
        tokenizer.fingerprint,
        options,
        verify_images,
        arrays,
    )


def _add_or_skip(
    columns: Columns,
    sample: ShardSample,
    read: Callable[[Member], bytes],
    renderer: Renderer,
    verify_images: bool,
) -> None:
    """Add the row of a sample, or the reason for which it is left out."""
    try:
        with only_this_sample():
            _add(columns, sample, read, renderer, verify_images)
    except SampleError as error:
        columns["skipped_keys"].append(sample.key[:_MAX_KEY].encode(errors="replace"))
        columns["skipped_reasons"].append(str(error)[:_MAX_REASON].encode(errors="replace"))


def _add(
    columns: Columns,
    sample: ShardSample,
    read: Callable[[Member], bytes],
    renderer: Renderer,
    verify_images: bool,
) -> None:
    """Add the row of a sample; nothing is added when it raises SampleError."""
    if sample.problem:
        raise SampleError(sample.problem)
    suffix = text_suffix(sample, read)
    text = sample.members[suffix]
    encoded = read(text)
    if b"\0" in encoded:
        raise SampleError(f"malformed {suffix}: it holds NUL bytes")
    record = decode_record(suffix.lower(), encoded)
    refuse_other_media(sample, read)
    names = image_names(sample, ordered=not isinstance(record, Chat))
    described = [_describe(name, read(sample.members[name]), verify_images) for name in names]
    images = [image for image, _ in described]
    rendered = renderer.render(record, images)
    shown = [images[i] for i in rendered.image_order]
    row = {
        "keys": sample.key.encode(), "tasks": TASKS.index(record.task), "text_suffixes": suffix.encode(),
        "text_offsets": text.offset, "text_sizes": text.size, "text_checksums": checksum([encoded]),
        "text_tokens": len(rendered.tokens),
        "image_checksums": checksum(read(sample.members[image.name]) for image in shown),
        "image_first": columns["image_first"][-1] + len(shown),
    }  # fmt: skip
    for name, value in row.items():
        columns[name].append(value)
    _add_images(columns, sample, shown)
    notes = [note for _, of_image in described for note in of_image]
    if not isinstance(record, Chat):  # a dialogue names its images
        notes += [GAP] * len(images_behind_gaps(names))
    columns["noted_keys"] += [sample.key.encode()] * len(notes)
    columns["notes"] += [note.encode() for note in notes]


def _add_images(columns: Columns, sample: ShardSample, images: list[ImageInfo]) -> None:
    """Add the rows of a sample's images."""
    for image in images:
        columns["image_suffixes"].append(image.name.encode())
        columns["image_offsets"].append(sample.members[image.name].offset)
        columns["image_sizes"].append(sample.members[image.name].size)
        columns["widths"].append(image.width)
        columns["heights"].append(image.height)


def _describe(name: str, data: bytes, verify: bool) -> tuple[ImageInfo, tuple[str, ...]]:
    """Read size and notes of an image."""
    try:
        header = read_image_header(data)
        if verify:
            load_pixels(data, side=1, max_pixels=header.width * header.height)
    except SampleError as error:
        raise SampleError(f"{name}: {error}") from error
    if not (0 < header.width < 1 << 31 and 0 < header.height < 1 << 31):
        raise SampleError(f"{name}: image of {header.width}x{header.height} pixels")
    return ImageInfo(name, header.width, header.height), header.notes


def _reader(descriptor: int, path: Path) -> Callable[[Member], bytes]:
    def read(member: Member) -> bytes:
        try:
            return read_member(descriptor, member)
        except OSError as error:  # of the shard: an OSError of a library is one of a sample
            raise DataError(f"{path}: cannot read the shard: {error.strerror}") from error

    return read
