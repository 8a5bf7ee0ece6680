"""Building indices: one shard, or every shard of a directory in parallel."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError, SampleError
from .formats import render_sample
from .images import IMAGE_SUFFIXES, load_pixels, read_header
from .index import COLUMNS, ShardIndex, file_digest, load_index, save_index
from .manifest import Manifest, ShardEntry, indexed_options, list_shards, save_manifest
from .shards import Member, ShardSample, checksum, scan_shard
from .skipped import SkippedKind, merge, tally
from .tasks import TASKS, decode_record
from .tokenizer import Tokenizer, load_tokenizer
from .writer import DEFAULT_OPTIONS, ImageInfo, RenderOptions


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
    entries = tuple(result.entry for result in results if result.entry)
    skipped = merge(itertools.chain.from_iterable(result.skipped for result in results))
    failed = {shard.name: result.error for shard, result in zip(shards, results, strict=True) if result.error}
    noted = merge(itertools.chain.from_iterable(result.noted for result in results))
    save_manifest(Manifest(fingerprint, entries, skipped, failed, options, noted), directory)
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
        verify_images: decode every picture instead of reading its header only.
        options: how records are rendered where there is a choice.

    Raises:
        DataError: the shard cannot be read or is truncated. A sample that cannot be used is recorded instead.
    """
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    columns["image_first"].append(0)
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            digest = file_digest(file)
            for sample in scan_shard(file, path):
                try:
                    _append(columns, sample, _reader(file.fileno()), tokenizer, verify_images, options)
                except SampleError as error:
                    columns["skipped_keys"].append(sample.key.encode(errors="replace"))
                    columns["skipped_reasons"].append(str(error).encode(errors="replace"))
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
    tokenizer: Tokenizer,
    verify_images: bool,
    options: RenderOptions,
) -> None:
    """Add the row of one sample; nothing is added when it raises SampleError."""
    if sample.duplicate:
        raise SampleError(f"two files named .{sample.duplicate}")
    try:
        "".join((sample.key, *sample.members)).encode()
    except UnicodeEncodeError:
        raise SampleError("a file name is not UTF-8") from None
    suffix = _text_suffix(sample, read)
    encoded = read(sample.members[suffix])
    record = decode_record(suffix, encoded)
    names = _image_names(sample)
    pictures = [read(sample.members[name]) for name in names]
    described = [_describe(name, data, verify_images) for name, data in zip(names, pictures, strict=True)]
    images = [image for image, _ in described]
    rendered = render_sample(record, images, tokenizer, image_tokens=0, options=options)
    shown = [images[i] for i in rendered.image_order]
    text = sample.members[suffix]
    row = {
        "keys": sample.key.encode(), "tasks": TASKS.index(record.task), "text_suffixes": suffix.encode(),
        "text_offsets": text.offset, "text_sizes": text.size, "text_checksums": checksum([encoded]),
        "text_tokens": len(rendered.tokens), "image_checksums": checksum(pictures[i] for i in rendered.image_order),
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
    for note in itertools.chain.from_iterable(notes for _, notes in described):
        columns["noted_keys"].append(sample.key.encode())
        columns["notes"].append(note.encode())


def _text_suffix(sample: ShardSample, read: Callable[[Member], bytes]) -> str:
    """`json` for a record with a task; `txt` for a shard as img2dataset writes it."""
    if "txt" not in sample.members:
        if "json" not in sample.members:
            raise SampleError(f"neither .json nor .txt, only {', '.join(sample.members)}")
        return "json"
    try:
        record = json.loads(read(sample.members["json"])) if "json" in sample.members else None
    except ValueError as error:
        raise SampleError(f"malformed json: {error}") from error
    return "json" if isinstance(record, dict) and "task" in record else "txt"


def _image_names(sample: ShardSample) -> list[str]:
    """Image members, shorter names first, so that `2.jpg` stands before `10.jpg`."""
    names = (name for name in sample.members if name.lower().rpartition(".")[2] in IMAGE_SUFFIXES)
    return sorted(names, key=lambda name: (len(name), name))


def _describe(name: str, data: bytes, verify: bool) -> tuple[ImageInfo, tuple[str, ...]]:
    """Size and notes of an image."""
    try:
        header = read_header(data)
        if verify:
            load_pixels(data, side=1, max_pixels=header.width * header.height)
    except SampleError as error:
        raise SampleError(f"{name}: {error}") from error
    return ImageInfo(name, header.width, header.height), header.notes


def _reader(descriptor: int) -> Callable[[Member], bytes]:
    return lambda member: os.pread(descriptor, member.size, member.offset)
