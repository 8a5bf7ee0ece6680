"""Micro-batches: what stands where, and what is supervised."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_qwenvl.batch import IGNORED_TASK, Batch, DataNeeds
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.loading import reader as reader_module
from megatron_qwenvl.data.loading.collate import collate
from megatron_qwenvl.data.loading.reader import SampleReader
from megatron_qwenvl.data.records.tasks import TASKS, parse_record
from megatron_qwenvl.data.rendering import formats
from megatron_qwenvl.data.rendering.renderer import Renderer
from megatron_qwenvl.data.rendering.token_builder import ImageInfo
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer
from megatron_qwenvl.data.sampling.sample_table import SampleTable
from megatron_qwenvl.data.sampling.sampler import (
    PACK_MULTIPLE,
    MicroBatch,
    StepSampler,
    open_training_sampler,
)
from megatron_qwenvl.data.shards.indexing import IndexJob, index_directory
from tests.unit.data.data_cases import Sample, mixed_samples, png_image, run_config, sample, write_source

SAMPLES = mixed_samples(90, seed=5)
SLOTS = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_source(path / "a", SAMPLES)
    return path


def reader_of(config: RunConfig, tokenizer: Tokenizer) -> SampleReader:
    return SampleReader(
        open_training_sampler(config, tokenizer.fingerprint), tokenizer, config.model.image_tokens
    )


def micro_batches(
    sampler: StepSampler, step: int = 0, ranks: int = 2
) -> tuple[SampleTable, list[MicroBatch]]:
    batch = sampler.global_batch(step)
    return batch.samples, [part for rank in sampler.balance_across_ranks(batch, ranks) for part in rank]


def batches_of(reader: SampleReader, needs: DataNeeds | None = None) -> list[tuple[list[str], Batch]]:
    """Every micro-batch of step 0 with the keys of its samples in order."""
    samples, parts = micro_batches(reader.sampler)
    return [
        (
            [reader.sampler.key(samples, row) for pack in part for row in pack],
            collate(part, samples, reader, needs or DataNeeds()),
        )
        for part in parts
    ]


def by_key(key: str) -> Sample:
    return next(item for item in SAMPLES if item["__key__"] == key)


@pytest.mark.parametrize("packing", ["isolated", "interleaved", "none"])
def test_batches_hold_their_samples_exactly(root: Path, byte_level: Tokenizer, packing: str) -> None:
    reader = reader_of(run_config(root, {"a": 1}, packing=packing), byte_level)
    for keys, batch in batches_of(reader):
        assert batch.tokens is not None and batch.labels is not None and batch.loss_mask is not None
        assert batch.task_ids is not None and batch.sample_ids is not None
        used = torch.zeros(batch.length, dtype=torch.bool)
        for ordinal, key in enumerate(keys):
            record = parse_record(json.loads(by_key(key)["json"]))
            images = [ImageInfo("png", 20, 10)] if "png" in by_key(key) else []
            rendered = Renderer(byte_level, SLOTS).render(record, images)
            at = (batch.sample_ids == ordinal).nonzero().flatten()
            assert at.tolist() == list(range(int(at[0]), int(at[0]) + len(rendered.tokens)))
            assert batch.tokens[at].tolist() == rendered.tokens
            assert batch.labels[at][:-1].tolist() == rendered.tokens[1:]
            assert batch.loss_mask[at].tolist() == [*map(float, rendered.loss_mask[1:]), 0.0]
            tasks = [
                TASKS.index(record.task) if supervised else IGNORED_TASK
                for supervised in rendered.loss_mask[1:]
            ]
            assert batch.task_ids[at].tolist() == [*tasks, IGNORED_TASK]
            used[at] = True
        padding = batch.tokens[~used]
        assert (padding == byte_level.eos).all()
        assert not batch.loss_mask[~used].any()
        assert (batch.sample_ids[~used] == -1).all()
        assert batch.real_tokens == int(used.sum())
        assert batch.num_samples == len(keys)


@pytest.mark.parametrize("packing", ["isolated", "interleaved", "none"])
def test_segments_and_positions(root: Path, byte_level: Tokenizer, packing: str) -> None:
    reader = reader_of(run_config(root, {"a": 1}, packing=packing), byte_level)
    for keys, batch in batches_of(reader):
        bounds = batch.cu_seqlens.tolist()
        assert batch.cu_seqlens.dtype == torch.int32
        assert (bounds[0], bounds[-1]) == (0, batch.length)
        assert all(end > start for start, end in zip(bounds, bounds[1:], strict=False))
        positions = [
            place for start, end in zip(bounds, bounds[1:], strict=False) for place in range(end - start)
        ]
        assert batch.position_ids.tolist() == positions
        assert batch.max_segment == max(np.diff(bounds))
        if packing != "none":  # padded up to the next multiple only
            assert batch.length % PACK_MULTIPLE == 0 and batch.length <= 512
            assert 0 <= batch.length - max(1, batch.real_tokens) < PACK_MULTIPLE
        if packing == "isolated":
            assert len(bounds) - 1 == len(keys) + (batch.real_tokens < batch.length)
        elif packing == "interleaved":
            assert bounds == [0, batch.length]
        else:
            assert bounds == list(range(0, 4 * 256 + 1, 256))


@pytest.mark.parametrize("packing", ["isolated", "interleaved", "none"])
def test_pixels_belong_to_the_slots(root: Path, byte_level: Tokenizer, packing: str) -> None:
    reader = reader_of(run_config(root, {"a": 1}, packing=packing), byte_level)
    seen = 0
    for keys, batch in batches_of(reader):
        assert batch.tokens is not None and batch.pixels is not None and batch.image_starts is not None
        assert batch.sample_ids is not None and batch.loss_mask is not None and batch.labels is not None
        assert batch.pixels.shape == (batch.num_images, 3, 28, 28)
        assert batch.image_starts.tolist() == sorted(batch.image_starts.tolist())
        slots = batch.image_starts[:, None] + torch.arange(SLOTS)
        assert (
            sorted(slots.flatten().tolist())
            == (batch.tokens == byte_level.img_pad).nonzero().flatten().tolist()
        )
        assert not (batch.loss_mask * (batch.labels == byte_level.img_pad)).any()
        for start, pixels in zip(batch.image_starts.tolist(), batch.pixels, strict=True):
            owner = by_key(keys[int(batch.sample_ids[start])])
            colour = Image.open(io.BytesIO(owner["png"])).getpixel((0, 0))
            assert tuple(pixels[:, 5, 5].tolist()) == colour
            seen += 1
    assert seen > 10


@pytest.mark.parametrize("packing", ["isolated", "interleaved", "none"])
def test_an_empty_micro_batch_is_padding(root: Path, byte_level: Tokenizer, packing: str) -> None:
    reader = reader_of(run_config(root, {"a": 1}, packing=packing), byte_level)
    samples = reader.sampler.global_batch(0).samples
    rows = reader.sampler.rows(2)
    batch = collate(((),) * rows, samples, reader, DataNeeds())
    assert batch.tokens is not None and batch.loss_mask is not None and batch.pixels is not None
    assert (batch.num_images, batch.num_samples, batch.real_tokens) == (0, 0, 0)
    assert batch.pixels.shape == (0, 3, 28, 28)
    assert (batch.tokens == byte_level.eos).all()
    assert not batch.loss_mask.any()
    assert len(batch.cu_seqlens) == rows + 1


def test_a_stage_without_needs_reads_nothing(root: Path, byte_level: Tokenizer) -> None:
    reader = reader_of(run_config(root, {"a": 1}), byte_level)
    full = batches_of(reader)
    blind = reader_of(run_config(root, {"a": 1}), byte_level)

    def fail(*_: object) -> None:
        raise AssertionError("a sample was read")

    blind._read = fail  # type: ignore[assignment,method-assign]
    for (_, batch), (_, expected) in zip(batches_of(blind, DataNeeds(False, False)), full, strict=True):
        assert batch.tokens is batch.labels is batch.loss_mask is batch.pixels is batch.image_starts is None
        assert batch.num_images == expected.num_images
        for name in ("cu_seqlens", "position_ids", "sample_ids"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))


def test_a_stage_reads_what_it_needs(root: Path, byte_level: Tokenizer) -> None:
    reader = reader_of(run_config(root, {"a": 1}), byte_level)
    for needs in (DataNeeds(pixels=True, tokens=False), DataNeeds(pixels=False, tokens=True)):
        for (_, batch), (_, expected) in zip(batches_of(reader, needs), batches_of(reader), strict=True):
            assert (batch.pixels is not None) == needs.pixels
            assert (batch.tokens is not None) == (batch.image_starts is not None) == needs.tokens
            for name in ("pixels",) if needs.pixels else ("tokens", "labels", "loss_mask", "image_starts"):
                assert torch.equal(getattr(batch, name), getattr(expected, name))


# ---- samples that turn out bad while training


@pytest.mark.parametrize("part", ["render", "decode_record", "load_pixels"])
@pytest.mark.parametrize("kind", [AssertionError, SyntaxError, OSError, EOFError, ValueError])
def test_no_exception_of_a_library_on_the_bytes_of_a_sample_ends_a_run(
    root: Path, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch, part: str, kind: type[Exception]
) -> None:
    def fail(*_: object) -> object:
        raise kind("broken")

    monkeypatch.setattr(Renderer if part == "render" else reader_module, part, fail)
    for keys, batch in batches_of(reader_of(run_config(root, {"a": 1}), byte_level)):
        images = [sum(name.endswith("png") for name in by_key(key)) for key in keys]
        bad = [i for i in range(len(keys)) if part != "load_pixels" or images[i]]
        assert list(batch.bad_samples) == bad
        assert all(f"cannot be used: {kind.__name__}: broken" in reason for reason in batch.bad_reasons)


def spoil(path: Path, old: bytes, new: bytes) -> None:
    """Change the bytes of a shard behind its index's back."""
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def two_samples(tmp_path: Path, png: bytes) -> RunConfig:
    """A good sample, and one whose image may be bad."""
    suspect = sample("suspect", {"task": "caption", "caption": "suspect"}, png=png)
    good = sample("good", {"task": "caption", "caption": "good"}, png=png_image())
    write_source(tmp_path / "s", [suspect, good])
    return run_config(tmp_path, {"s": 1}, global_batch_size=2).model_copy(update={"seed": 1})


def test_an_unreadable_image_is_black_and_named(tmp_path: Path, byte_level: Tokenizer) -> None:
    config = two_samples(tmp_path, png_image(50, 50)[:-40])
    ((keys, batch),) = [entry for entry in batches_of(reader_of(config, byte_level)) if entry[0]]
    assert keys == ["good", "suspect"]
    bad = 1
    assert batch.pixels is not None and batch.loss_mask is not None and batch.sample_ids is not None
    assert batch.bad_samples == (bad,)
    assert batch.bad_reasons[0].endswith(
        "000000.tar:suspect: png: cannot decode the image: image file is truncated"
    )
    assert not batch.pixels[bad].any()
    assert batch.pixels[1 - bad].any()
    # Whoever reads tokens only cannot know: the trainer takes the loss out by `sample_ids`.
    assert batch.loss_mask[batch.sample_ids == bad].any()


@pytest.mark.parametrize(
    "new", [b'"caption": "suspect!', b'"caption": "suspecT"'], ids=["malformed", "valid"]
)
def test_an_altered_text_becomes_padding_and_is_named(
    tmp_path: Path, byte_level: Tokenizer, new: bytes
) -> None:
    config = two_samples(tmp_path, png_image())
    spoil(tmp_path / "s" / "000000.tar", b'"caption": "suspect"', new)
    ((keys, batch),) = [entry for entry in batches_of(reader_of(config, byte_level)) if entry[0]]
    assert keys == ["good", "suspect"]
    bad = 1
    assert batch.tokens is not None and batch.loss_mask is not None and batch.sample_ids is not None
    assert batch.image_starts is not None
    assert batch.bad_samples == (bad,)
    assert "suspect: the text bytes are not those that were indexed" in batch.bad_reasons[0]
    assert not batch.loss_mask[batch.sample_ids == bad].any()
    assert batch.loss_mask[batch.sample_ids == 1 - bad].any()
    slots = (batch.tokens == byte_level.img_pad).nonzero().flatten()
    assert (batch.image_starts[:, None] + torch.arange(SLOTS)).flatten().tolist() == slots.tolist()


def test_another_image_in_the_same_place_is_named_by_the_rank_that_reads_it(
    tmp_path: Path, byte_level: Tokenizer
) -> None:
    old, new = (png_image(colour=(number, 30, 60)) for number in (200, 201))
    assert len(old) == len(new)
    config = two_samples(tmp_path, old)
    path = tmp_path / "s" / "000000.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(old, new, 1))
    reader = reader_of(config, byte_level)
    for needs, bad in ((DataNeeds(tokens=False), (1,)), (DataNeeds(pixels=False), ())):
        ((_, batch),) = [entry for entry in batches_of(reader, needs) if entry[0]]
        assert batch.bad_samples == bad
        if batch.pixels is not None:
            assert not batch.pixels[1].any() and batch.pixels[0].any()
            assert "suspect: the image bytes are not those" in batch.bad_reasons[0]


def test_a_shard_of_another_length_stops(tmp_path: Path, byte_level: Tokenizer) -> None:
    config = two_samples(tmp_path, png_image())
    reader = reader_of(config, byte_level)
    reader.sampler.global_batch(0)
    write_source(tmp_path / "t", [sample("other", {"task": "text", "text": "x" * 20_000})])
    (tmp_path / "t" / "000000.tar").replace(tmp_path / "s" / "000000.tar")
    with pytest.raises(
        DataError, match=r"000000\.tar: expected \d+ bytes as indexed, found \d+; run python tools/"
    ):
        batches_of(reader)


def test_a_rendering_that_changed_without_a_new_version_stops(
    tmp_path: Path, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = two_samples(tmp_path, png_image())
    monkeypatch.setitem(formats.LANGUAGES, "en", "English words")
    reader = reader_of(config, byte_level)
    with pytest.raises(
        DataError, match=r"expected \d+ tokens as indexed, found \d+; run python tools/.* --force"
    ):
        batches_of(reader)
    index_directory(tmp_path / "s", IndexJob(force=True))
    assert all(not batch.bad_samples for _, batch in batches_of(reader_of(config, byte_level)))


def test_chinese_source_prompts_in_chinese(tmp_path: Path, byte_level: Tokenizer) -> None:
    write_source(tmp_path / "s", [{"__key__": "0", "jpg": png_image(), "txt": "花".encode()}])
    index_directory(tmp_path / "s", IndexJob())
    config = run_config(tmp_path, {"s": 1}, global_batch_size=1)
    source = config.data.sources[0].model_copy(update={"language": "zh"})
    config = config.model_copy(update={"data": config.data.model_copy(update={"sources": (source,)})})
    batch = batches_of(reader_of(config, byte_level))[0][1]
    assert batch.tokens is not None
    assert "Generate the caption in Chinese: 花<|endoftext|>" in byte_level.decode(batch.tokens.tolist())
