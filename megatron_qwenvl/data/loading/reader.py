"""Samples to token ids and pixels: the only place that reads sample bytes during training."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_qwenvl.data.errors import DataError, SampleError, only_this_sample
from megatron_qwenvl.data.images import load_pixels
from megatron_qwenvl.data.lru_cache import LruCache
from megatron_qwenvl.data.records.tasks import decode_record
from megatron_qwenvl.data.rendering.renderer import Renderer
from megatron_qwenvl.data.rendering.token_builder import TokenizedSample
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer
from megatron_qwenvl.data.sampling.sample_table import SampleTable
from megatron_qwenvl.data.sampling.sampler import StepSampler
from megatron_qwenvl.data.shards.index import ShardIndex
from megatron_qwenvl.data.shards.samples import checksum, read_member
from megatron_qwenvl.data.shards.tar import Member
from megatron_qwenvl.runtime.retry import retry_read

OPEN_SHARDS = 64


class SampleReader:
    """Reads single samples by offset. Belongs to one process: it holds open files."""

    def __init__(self, sampler: StepSampler, tokenizer: Tokenizer, image_tokens: int) -> None:
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self._renderers = [
            Renderer(tokenizer, image_tokens, source.config.language, source.directory.catalog.options)
            for source in sampler.sources
        ]
        self._files: LruCache[int] = LruCache(OPEN_SHARDS, drop=os.close)

    def tokens(self, samples: SampleTable, row: int) -> TokenizedSample:
        """Read a sample's tokens with their loss mask.

        Raises:
            SampleError: the record is not the one that was indexed.
            DataError: the shard cannot be read or is shorter than it was, or the rendering is another one.
        """
        source, shard, at = self._place(samples, row)
        index = self.sampler.index(source, shard)
        name, member = index.text_member(at)
        encoded = self._read(source, shard, member)
        self._check(index, source, shard, "text", at, [encoded])
        images = [info for info, _ in index.images(at)]
        with only_this_sample():
            record = decode_record(name.rpartition(".")[2].lower(), encoded)
            rendered = self._renderers[source].render(record, images)
        if len(rendered.tokens) != samples.length[row]:
            raise DataError(
                f"{self.sampler.name(samples, row)}: expected {samples.length[row]} tokens as indexed, found "
                f"{len(rendered.tokens)}; run {self.sampler.sources[source].directory.index_command('--force')}"
            )
        return rendered

    def pixels(self, samples: SampleTable, row: int) -> NDArray[np.uint8]:
        """Read a sample's images in the order in which its text shows them, uint8 `[images, 3, S, S]`.

        Raises:
            SampleError: an image cannot be decoded or is not the one that was indexed.
            DataError: the shard cannot be read or is shorter than it was.
        """
        source, shard, at = self._place(samples, row)
        index = self.sampler.index(source, shard)
        data = self.sampler.data
        members = index.images(at)
        encoded = [self._read(source, shard, member) for _, member in members]
        self._check(index, source, shard, "image", at, encoded)
        pixels = []
        for (info, _), content in zip(members, encoded, strict=True):
            try:
                with only_this_sample():
                    pixels.append(load_pixels(content, data.image_size, data.max_image_pixels))
            except SampleError as error:
                raise SampleError(f"{info.name}: {error}") from error
        return np.stack(pixels)

    def _place(self, samples: SampleTable, row: int) -> tuple[int, int, int]:
        return int(samples.source[row]), int(samples.shard[row]), int(samples.row[row])

    def _read(self, source: int, shard: int, member: Member) -> bytes:
        path = self.sampler.sources[source].directory.shard_path(shard)

        def read() -> bytes:
            try:
                return read_member(self._files.get((source, shard), lambda: _open(path)), member)
            except OSError:  # the open file may be stale for good where another `open` finds the shard
                with contextlib.suppress(OSError):
                    self._files.forget((source, shard))
                raise

        try:
            return retry_read(path, read, folder=path.parent)
        except OSError as error:
            raise DataError(f"{path}: cannot read the shard: {error.strerror}") from error

    def _check(
        self,
        index: ShardIndex,
        source: int,
        shard: int,
        kind: Literal["text", "image"],
        row: int,
        encoded: list[bytes],
    ) -> None:
        """Compare bytes with their checksum in the index."""
        expected, found = int(index.arrays[f"{kind}_checksums"][row]), checksum(encoded)
        if found == expected:
            return
        directory = self.sampler.sources[source].directory
        directory.check_size(shard)  # another shard altogether, not a damaged sample
        raise SampleError(
            f"the {kind} bytes are not those that were indexed (checksum {found:08x}, expected {expected:08x})"
        )


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
