"""Hundreds of seeded mutations of shards: nothing crashes, nothing is lost or exchanged without a word."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_qwenvl.data.errors import DataError, SampleError
from megatron_qwenvl.data.loading.reader import SampleReader
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer
from megatron_qwenvl.data.sampling.sample_table import SampleTable
from megatron_qwenvl.data.sampling.sampler import open_training_sampler
from megatron_qwenvl.data.shards.index import ShardIndex
from megatron_qwenvl.data.shards.index_builder import build_index
from megatron_qwenvl.data.shards.indexing import IndexJob, index_directory
from megatron_qwenvl.data.shards.samples import read_member
from megatron_qwenvl.data.shards.tar_header import BLOCK
from tests.unit.data.data_cases import png_image, run_config

Mutation = Callable[[bytearray, random.Random, "Shard"], None]


@dataclass(frozen=True)
class Shard:
    """A tar with its samples.

    Attributes:
        content: the tar.
        samples: text and images of each sample by key.
        headers: where the headers of files stand, extension headers too.
        spans: first and last byte of the contents of each file.
        extended_names: names stand in extension headers.
    """

    content: bytes
    samples: dict[str, list[bytes]]
    headers: list[int]
    spans: list[tuple[int, int]]
    extended_names: bool


def make_shard(format_: int) -> Shard:
    """Samples of one and two images, of text alone and dialogues, with names that need what the format has."""
    mark = {tarfile.USTAR_FORMAT: "a", tarfile.GNU_FORMAT: "long" * 30, tarfile.PAX_FORMAT: "é"}[format_]
    samples: dict[str, list[bytes]] = {}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as tar:
        for number in range(8):
            key = f"{mark}/{number}"
            images = [png_image(colour=(number * 20, place, 7)) for place in range(number % 3)]
            record: dict[str, object] = {
                "task": "vqa",
                "question": "q" * number * 90 + "?",
                "answer": f"a{number}",
            }
            if not images:
                record = {"task": "text", "text": f"text {number} " * 100}
            text = json.dumps(record).encode()
            samples[key] = [text, *images]
            files = [("json", text), *((f"{place}.png", data) for place, data in enumerate(images))]
            for suffix, data in files:
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    content = buffer.getvalue()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    headers = sorted({at for member in members for at in range(member.offset, member.offset_data, BLOCK)})
    return Shard(
        content,
        samples,
        headers,
        [(m.offset_data, m.offset_data + m.size) for m in members],
        format_ != tarfile.USTAR_FORMAT,
    )


# ---- mutations


def flip_bytes(data: bytearray, rng: random.Random, shard: Shard) -> None:
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= rng.randint(1, 255)


def flip_near_headers(data: bytearray, rng: random.Random, shard: Shard) -> None:
    data[rng.choice(shard.headers) + rng.randrange(BLOCK)] ^= rng.randint(1, 255)


def zero_blocks(data: bytearray, rng: random.Random, shard: Shard) -> None:
    at, count = (
        rng.choice(shard.headers[:-4]),
        rng.choice([1, 2, 3, 8]),
    )  # without the last sample it is a whole tar
    if (at + count * BLOCK) % tarfile.RECORDSIZE == 0:  # two blocks there are how an archive ends
        count += 1
    data[at : at + count * BLOCK] = bytes(len(data[at : at + count * BLOCK]))


def random_page(data: bytearray, rng: random.Random, shard: Shard) -> None:
    at, count = rng.randrange(len(data)), rng.choice([10, BLOCK, 4096])
    data[at : at + count] = rng.randbytes(len(data[at : at + count]))


def cut(data: bytearray, rng: random.Random, shard: Shard) -> None:
    del data[rng.choice([rng.randrange(len(data)), rng.choice(shard.headers)]) :]


def remove_block(data: bytearray, rng: random.Random, shard: Shard) -> None:
    at = rng.randrange(shard.spans[-1][1]) // BLOCK * BLOCK
    del data[at : at + BLOCK]


def exchange_blocks(data: bytearray, rng: random.Random, shard: Shard) -> None:
    first = rng.choice(shard.spans)[0]  # two exchanged headers would be another whole tar
    second = rng.randrange(shard.spans[-1][1]) // BLOCK * BLOCK
    one, other = bytes(data[first : first + BLOCK]), bytes(data[second : second + BLOCK])
    data[first : first + BLOCK], data[second : second + BLOCK] = other, one


def append(data: bytearray, rng: random.Random, shard: Shard) -> None:
    data += rng.choice([rng.randbytes(700), shard.content[:3000], b"\0" * 511 + b"x"])


def change_size(data: bytearray, rng: random.Random, shard: Shard) -> None:
    at = rng.choice(shard.headers)
    field = bytes(data[at + 124 : at + 135])
    old = int(field, 8) if field.isdigit() else 0
    sizes = [0, 1, old + 1, old + BLOCK, max(old - 1, 0), old + BLOCK * rng.randint(1, 12), 8**11 - 1]
    texts = [b"%011o\0" % size for size in sizes] + [
        b"\xff" * 12,
        b"\x80" + b"\xff" * 11,
        b"-1",
        b"1e400\0",
        b"9" * 12,
    ]
    change_header(data, at, 124, rng.choice(texts))


def change_kind(data: bytearray, rng: random.Random, shard: Shard) -> None:
    change_header(data, rng.choice(shard.headers), 156, bytes([rng.choice(b"\x001234567DgKLMNSVxXZ")]))


def change_header(data: bytearray, header: int, at: int, value: bytes) -> None:
    """Change a header and make its checksum right."""
    data[header + at : header + at + len(value)] = value
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + BLOCK])


def change_record(data: bytearray, rng: random.Random, shard: Shard) -> None:
    """Other JSON of the same length."""
    begin, end = rng.choice([span for span in shard.spans if data[span[0] : span[0] + 1] == b"{"])
    at = rng.randrange(begin, end)
    value = rng.choice([b"1e400", b"[[[[[", b"NaN", b"\xff\xfe", b'\\ud800"', b"null", b"\0"])
    data[at : at + len(value)] = value[: end - at]


MUTATIONS: list[Mutation] = [
    flip_bytes, flip_near_headers, zero_blocks, random_page, cut, remove_block, exchange_blocks, append, change_size,
    change_kind, change_record,
]  # fmt: skip


# ---- before indexing


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_mutations_before_indexing(tmp_path: Path, byte_level: Tokenizer, format_: int) -> None:
    shard = make_shard(format_)
    path = tmp_path / "s.tar"
    refused = 0
    for number in range(220):
        mutation = MUTATIONS[number % len(MUTATIONS)]
        data = bytearray(shard.content)
        mutation(data, random.Random(number), shard)
        path.write_bytes(data)
        try:
            index = build_index(path, byte_level)
        except DataError as error:
            assert str(error).startswith(f"{path}: "), error
            refused += 1
        else:
            check_nothing_lost(path, shard, index, bytes(data), f"{mutation.__name__} {number}")
    assert 60 < refused < 200


def check_nothing_lost(path: Path, shard: Shard, index: ShardIndex, data: bytes, mutation: str) -> None:
    """Every sample is there with its own files, or named; a file that was itself altered may be so."""
    named = {key.decode(errors="replace") for key in index.arrays["skipped_keys"]}
    found = {index.key(row): read_sample(path, index, row) for row in range(len(index))}
    for key, files in shard.samples.items():
        if key in named:
            continue
        # No checksum guards the names in extension headers: an altered one is another name, and that is told.
        places = found.get(key) or next((value for value in found.values() if value[0][1] == files[0]), None)
        renamed = named - shard.samples.keys()
        if places is None or len(places) != len(files):
            assert renamed and shard.extended_names, f"{mutation}: {key} is lost or not whole"
            continue
        for (begin, got), expected in zip(places, files, strict=True):
            at_its_place = shard.content[begin : begin + len(got)] == expected
            assert got.rstrip(b"\0") == expected or at_its_place, f"{mutation}: {key} holds other bytes"


def read_sample(path: Path, index: ShardIndex, row: int) -> list[tuple[int, bytes]]:
    """Place and bytes of the text and the images of a sample."""
    with path.open("rb") as file:
        members = [index.text_member(row)[1], *(member for _, member in index.images(row))]
        return [(member.offset, read_member(file.fileno(), member)) for member in members]


# ---- after indexing


def test_mutations_after_indexing(tmp_path: Path, byte_level: Tokenizer) -> None:
    shard = make_shard(tarfile.PAX_FORMAT)
    path = tmp_path / "s" / "s.tar"
    path.parent.mkdir()
    path.write_bytes(shard.content)
    index_directory(path.parent, IndexJob())
    config = run_config(tmp_path, {"s": 1}, global_batch_size=8, max_sample_length=4096, pack_length=4096)
    sampler = open_training_sampler(config, byte_level.fingerprint)
    samples = sampler.global_batch(0).samples
    noticed = 0
    for number in range(150):
        data = bytearray(shard.content)
        (flip_bytes, random_page, exchange_blocks)[number % 3](data, random.Random(number), shard)
        path.write_bytes(data)
        reader = SampleReader(sampler, byte_level, config.model.image_tokens)
        for row in range(len(samples)):
            text, images = altered_parts(shard, bytes(data), sampler.index(0, 0), int(samples.row[row]))
            assert fails(reader.tokens, samples, row) == text
            if samples.images[row]:
                assert fails(reader.pixels, samples, row) == images
            noticed += text + images
    assert noticed > 40


def altered_parts(shard: Shard, data: bytes, index: ShardIndex, row: int) -> tuple[bool, bool]:
    def altered(offset: int, size: int) -> bool:
        return data[offset : offset + size] != shard.content[offset : offset + size]

    text = index.text_member(row)[1]
    return altered(text.offset, text.size), any(altered(m.offset, m.size) for _, m in index.images(row))


def fails(read: Callable[[SampleTable, int], object], samples: SampleTable, row: int) -> bool:
    try:
        read(samples, row)
    except SampleError as error:
        assert "are not those that were indexed" in str(error)
        return True
    return False


def test_the_shards_are_whole_before(tmp_path: Path, byte_level: Tokenizer) -> None:
    for format_ in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        shard = make_shard(format_)
        path = tmp_path / "s.tar"
        path.write_bytes(shard.content)
        index = build_index(path, byte_level)
        found = {
            index.key(row): [data for _, data in read_sample(path, index, row)] for row in range(len(index))
        }
        assert found == shard.samples
        assert np.array_equal(index.image_counts, [len(files) - 1 for files in shard.samples.values()])
