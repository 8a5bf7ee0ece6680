"""Building indices: one shard, or every shard of a directory in parallel."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qwenvl.data.errors import DataError, SampleError, only_this_sample
from megatron_qwenvl.data.images import load_pixels, read_header
from megatron_qwenvl.data.records.dialogues import Chat
from megatron_qwenvl.data.records.tasks import TASKS, decode_record
from megatron_qwenvl.data.rendering.renderer import Renderer
from megatron_qwenvl.data.rendering.token_builder import DEFAULT_OPTIONS, ImageInfo, RenderOptions
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer, load_tokenizer

from .directory import Manifest, ShardEntry, indexed_options, list_shards, save_manifest, unread_shards
from .index import COLUMNS, ShardIndex, file_digest, load_index, save_index
from .members import GAP, image_names, images_behind_gaps, refuse_other_media, text_suffix
from .samples import ShardSample, checksum, read_member, scan_shard
from .skipped import SkippedKind, merge, tally
from .tar import Member

JOINT = "another tar begins here: joined by cat, or the part before was overwritten with zeros"
_MAX_REASON = 300
_MAX_KEY = 1000


@dataclass(frozen=True)
class IndexJob:
    """How a shard is indexed; what a worker process is given."""

    tokenizer: str | None = None
    verify_images: bool = False
    force: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of `RenderOptions` that are wanted; the others are as when the directory was indexed last."""


@dataclass(frozen=True)
class ShardResult:
    """What became of a shard: its entry, why it leaves samples out and notes on images, or why there is no entry."""

    entry: ShardEntry | None = None
    skipped: tuple[SkippedKind, ...] = ()
    noted: tuple[SkippedKind, ...] = ()
    fresh: bool = False
    error: str = ""

    @classmethod
    def of(cls, index: ShardIndex, fresh: bool) -> ShardResult:
        """The result of an index."""
        skipped = tally(index.shard, index.arrays["skipped_keys"], index.arrays["skipped_reasons"])
        noted = tally(index.shard, index.arrays["noted_keys"], index.arrays["notes"])
        return cls(ShardEntry.of(index), skipped, noted, fresh)


def index_directory(
    directory: Path,
    job: IndexJob,
    executor: Executor | None = None,
    on_result: Callable[[ShardResult, int], None] | None = None,
) -> list[ShardResult]:
    """Index every shard of a directory and write its manifest; shards whose index is current are left alone.

    A shard that cannot be indexed does not keep the others from being indexed. It is missing from the
    manifest, so that opening the directory names it.

    Args:
        directory: holds `*.tar`.
        job: tokenizer and options.
        executor: runs the shards in parallel (a process pool or mpi4py's); none: one after the other, here.
        on_result: called with each result and the number of shards of the directory.

    Raises:
        DataError: no such directory, no shard in it, or no such tokenizer.
    """
    shards = list_shards(directory)
    fingerprint = _tokenizer(job.tokenizer).fingerprint
    options = replace(indexed_options(directory), **job.options)
    index = functools.partial(index_shard, job=job, options=options)
    results = []
    for result in executor.map(index, shards) if executor else map(index, shards):
        results.append(result)
        if on_result:
            on_result(result, len(shards))
    failed = {shard.name: result.error for shard, result in zip(shards, results, strict=True) if result.error}
    for name, reason in unread_shards(directory).items():
        failed[name] = reason
        results.append(ShardResult(error=reason))
        if on_result:
            on_result(results[-1], len(results))
    entries = tuple(result.entry for result in results if result.entry)
    skipped = merge(itertools.chain.from_iterable(result.skipped for result in results))
    noted = merge(itertools.chain.from_iterable(result.noted for result in results))
    try:
        save_manifest(Manifest(fingerprint, entries, skipped, failed, options, noted), directory)
    except OSError as error:
        raise DataError(f"{directory}: cannot write the manifest: {error.strerror}") from error
    return results


def index_shard(path: Path, job: IndexJob, options: RenderOptions = DEFAULT_OPTIONS) -> ShardResult:
    """Index one shard unless its index is current."""
    try:
        tokenizer = _tokenizer(job.tokenizer)
        index = None if job.force else _current(path, tokenizer, job.verify_images, options)
        if index:
            return ShardResult.of(index, fresh=False)
        index = build_index(path, tokenizer, job.verify_images, options)
        save_index(index, path.parent)
        return ShardResult.of(index, fresh=True)
    except DataError as error:
        return ShardResult(error=str(error))
    except OSError as error:
        return ShardResult(error=f"{path}: cannot write the index: {error.strerror}")


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str | None) -> Tokenizer:
    """Loaded once in each worker process."""
    return load_tokenizer(path)


def _current(
    path: Path, tokenizer: Tokenizer, verify_images: bool, options: RenderOptions
) -> ShardIndex | None:
    """The stored index if it was made from this very file, with this tokenizer, these options and these checks."""
    try:
        index = load_index(path)
        stat = path.stat()
    except (DataError, OSError):
        return None
    same_file = (index.size, index.modified) == (stat.st_size, stat.st_mtime_ns)
    same_text = (index.tokenizer, index.options) == (tokenizer.fingerprint, options)
    return index if same_file and same_text and (index.images_verified or not verify_images) else None


def build_index(
    path: Path, tokenizer: Tokenizer, verify_images: bool = False, options: RenderOptions = DEFAULT_OPTIONS
) -> ShardIndex:
    """Read a shard once from end to end.

    Args:
        path: the tar.
        tokenizer: counts the text tokens.
        verify_images: decode every image instead of reading its header only.
        options: how records are rendered where there is a choice.

    Raises:
        DataError: the shard cannot be read or is truncated. A sample that cannot be used is recorded instead.
    """
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    columns["image_first"].append(0)
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise DataError(f"{path}: cannot read the shard: not a file")
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            digest = file_digest(file)
            read = _reader(file.fileno(), path)
            renderer = Renderer(tokenizer, image_tokens=0, options=options)
            joints: list[int] = []
            for sample in scan_shard(file, path, joints):
                try:
                    with only_this_sample():
                        _append(columns, sample, read, renderer, verify_images)
                except SampleError as error:
                    columns["skipped_keys"].append(sample.key[:_MAX_KEY].encode(errors="replace"))
                    columns["skipped_reasons"].append(str(error)[:_MAX_REASON].encode(errors="replace"))
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


def _append(
    columns: dict[str, list[Any]],
    sample: ShardSample,
    read: Callable[[Member], bytes],
    renderer: Renderer,
    verify_images: bool,
) -> None:
    """Add the row of one sample; nothing is added when it raises SampleError."""
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
    for image in shown:
        columns["image_suffixes"].append(image.name.encode())
        columns["image_offsets"].append(sample.members[image.name].offset)
        columns["image_sizes"].append(sample.members[image.name].size)
        columns["widths"].append(image.width)
        columns["heights"].append(image.height)
    behind_gaps = [] if isinstance(record, Chat) else images_behind_gaps(names)  # a dialogue names its images
    for note in (*itertools.chain.from_iterable(notes for _, notes in described), *[GAP] * len(behind_gaps)):
        columns["noted_keys"].append(sample.key.encode())
        columns["notes"].append(note.encode())


def _describe(name: str, data: bytes, verify: bool) -> tuple[ImageInfo, tuple[str, ...]]:
    """Size and notes of an image."""
    try:
        header = read_header(data)
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
