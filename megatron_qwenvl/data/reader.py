"""Planned samples to token ids and pixels: the only place that reads sample bytes during training."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .cache import LruCache
from .errors import DataError, SampleError
from .formats import render_sample
from .images import load_pixels
from .order import SampleTable
from .plan import StepPlan
from .shards import Member, read_member
from .tasks import decode_record
from .tokenizer import Tokenizer
from .writer import Rendered

OPEN_SHARDS = 64


class SampleReader:
    """Reads single samples by offset. Belongs to one process: it holds open files."""

    def __init__(self, plan: StepPlan, tokenizer: Tokenizer, image_tokens: int) -> None:
        self.plan = plan
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self._files: LruCache[int] = LruCache(OPEN_SHARDS, drop=os.close)

    def tokens(self, samples: SampleTable, row: int) -> Rendered:
        """A sample's tokens with loss mask.

        Raises:
            SampleError: the record can no longer be used although it could when it was indexed.
            DataError: shard and index differ.
        """
        source, shard, at = self._place(samples, row)
        index = self.plan.index(source, shard)
        name, member = index.text_member(at)
        record = decode_record(name.rpartition(".")[2], self._read(source, shard, name, member))
        images = [info for info, _ in index.images(at)]
        language = self.plan.sources[source].config.language
        rendered = render_sample(record, images, self.tokenizer, self.image_tokens, language)
        if len(rendered.tokens) != samples.length[row]:
            raise DataError(
                f"{self.plan.name(samples, row)}: the index does not match the shard: expected "
                f"{samples.length[row]} tokens, found {len(rendered.tokens)}; run tools/index_shards.py"
            )
        return rendered

    def pixels(self, samples: SampleTable, row: int) -> NDArray[np.uint8]:
        """A sample's pictures in the order in which its text shows them, uint8 `[images, 3, S, S]`.

        Raises:
            SampleError: a picture cannot be decoded.
            DataError: shard and index differ.
        """
        source, shard, at = self._place(samples, row)
        index = self.plan.index(source, shard)
        data = self.plan.data
        pictures = []
        for info, member in index.images(at):
            encoded = self._read(source, shard, f"{index.key(at)}.{info.name}", member)
            try:
                pictures.append(load_pixels(encoded, data.image_size, data.max_image_pixels))
            except SampleError as error:
                raise SampleError(f"{info.name}: {error}") from error
        return np.stack(pictures)

    def _place(self, samples: SampleTable, row: int) -> tuple[int, int, int]:
        return int(samples.source[row]), int(samples.shard[row]), int(samples.row[row])

    def _read(self, source: int, shard: int, name: str, member: Member) -> bytes:
        path = self.plan.sources[source].directory.shard_path(shard)
        try:
            descriptor = self._files.get((source, shard), lambda: _open(path))
            return read_member(descriptor, path, name, member)
        except OSError as error:
            raise DataError(f"{path}: cannot read the shard: {error.strerror}") from error


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
