"""The packs of a micro-batch to the typed `Batch`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_qwenvl.batch import IGNORED_TASK, Batch, DataNeeds
from megatron_qwenvl.config.schema import Packing
from megatron_qwenvl.data.errors import SampleError
from megatron_qwenvl.data.rendering.token_builder import TokenizedSample
from megatron_qwenvl.data.sampling.sample_table import SampleTable
from megatron_qwenvl.data.sampling.sampler import MicroBatch

from .reader import SampleReader


@dataclass(frozen=True)
class Placement:
    """Positions of the samples in a micro-batch.

    Attributes:
        rows: row of each sample in the table of the global batch.
        starts: position of the first token of each sample.
        cu_seqlens: boundaries of the attention segments, first 0, last the number of positions.
    """

    rows: list[int]
    starts: list[int]
    cu_seqlens: list[int]


def place_samples(
    micro_batch: MicroBatch, samples: SampleTable, packing: Packing, row_length: int
) -> Placement:
    """Place the packs of a micro-batch one after the other, `row_length` positions each.

    With `isolated` (block-diagonal attention) every sample is a segment, and so is the padding after the last one.
    Otherwise (plain causal attention) a pack or a padded row is one segment, padding included.
    """
    placement = Placement([], [], [0])
    for number, pack in enumerate(micro_batch):
        position = number * row_length
        for row in pack:
            placement.rows.append(row)
            placement.starts.append(position)
            position += int(samples.length[row])
            if packing == "isolated":
                placement.cu_seqlens.append(position)
        if placement.cu_seqlens[-1] < (number + 1) * row_length:
            placement.cu_seqlens.append((number + 1) * row_length)
    return placement


def collate(micro_batch: MicroBatch, samples: SampleTable, reader: SampleReader, needs: DataNeeds) -> Batch:
    """Read the needed tensors of a micro-batch and assemble them.

    A sample that can no longer be read keeps its place: its images are black, its text is padding, and it is
    named in `bad_samples`.

    Args:
        micro_batch: packs of the global batch.
        samples: table of the global batch.
        reader: reads tokens and pixels; not used where nothing is needed.
        needs: what the rank's pipeline stage uses.

    Raises:
        DataError: a shard differs from its index.
    """
    sampler = reader.sampler
    filled = int(sum(samples.length[list(pack)].sum() for pack in micro_batch))
    placement = place_samples(micro_batch, samples, sampler.data.packing, sampler.padded_length(filled))
    images = samples.images[placement.rows]
    bad: dict[int, str] = {}
    batch = Batch(
        cu_seqlens=torch.tensor(placement.cu_seqlens, dtype=torch.int32),
        position_ids=_positions(placement.cu_seqlens),
        num_images=int(images.sum()),
        image_starts=None,
        num_samples=len(placement.rows),
        sample_ids=_sample_ids(placement, samples),
        real_tokens=int(samples.length[placement.rows].sum()),
    )
    if needs.tokens:
        _add_tokens(batch, placement, samples, reader, bad)
    if needs.pixels:
        batch.pixels = _pixels(placement, samples, reader, bad)
    batch.bad_samples = tuple(sorted(bad))
    batch.bad_reasons = tuple(
        f"{sampler.name(samples, placement.rows[ordinal])}: {bad[ordinal]}" for ordinal in batch.bad_samples
    )
    rows = [placement.rows[ordinal] for ordinal in batch.bad_samples]
    batch.bad_names = tuple((sampler.shard(samples, row), sampler.key(samples, row)) for row in rows)
    return batch


def _positions(cu_seqlens: list[int]) -> Tensor:
    """Count positions that restart at every boundary, int64 `[T]`."""
    return torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(cu_seqlens)])


def _sample_ids(placement: Placement, samples: SampleTable) -> Tensor:
    """Mark each position with the ordinal of its sample, -1 for padding, int32 `[T]`."""
    ids = torch.full((placement.cu_seqlens[-1],), -1, dtype=torch.int32)
    for ordinal, (row, start) in enumerate(zip(placement.rows, placement.starts, strict=True)):
        ids[start : start + int(samples.length[row])] = ordinal
    return ids


def _add_tokens(
    batch: Batch, placement: Placement, samples: SampleTable, reader: SampleReader, bad: dict[int, str]
) -> None:
    """Fill in tokens, labels, loss mask, task ids and the positions of the images."""
    length = batch.length
    tokens = np.full(length, reader.tokenizer.eos, dtype=np.int64)
    labels = np.full(length, reader.tokenizer.eos, dtype=np.int64)
    loss_mask = np.zeros(length, dtype=np.float32)
    tasks = np.full(length, IGNORED_TASK, dtype=np.uint8)
    image_starts: list[int] = []
    for ordinal, (row, start) in enumerate(zip(placement.rows, placement.starts, strict=True)):
        try:
            tokenized = reader.tokens(samples, row)
        except SampleError as error:
            tokenized = _placeholder(reader, int(samples.length[row]), int(samples.images[row]))
            bad[ordinal] = str(error)
        last = start + len(tokenized.tokens) - 1
        tokens[start : last + 1] = tokenized.tokens
        # Position t predicts t + 1; the last token of a sample predicts nothing, least of all the next sample.
        labels[start:last] = tokenized.tokens[1:]
        loss_mask[start:last] = tokenized.loss_mask[1:]
        tasks[start:last][loss_mask[start:last] > 0] = samples.task[row]
        image_starts += [start + at for at in tokenized.image_starts]
    batch.tokens, batch.labels = torch.from_numpy(tokens), torch.from_numpy(labels)
    batch.loss_mask, batch.task_ids = torch.from_numpy(loss_mask), torch.from_numpy(tasks)
    batch.image_starts = torch.tensor(image_starts, dtype=torch.int64)


def _placeholder(reader: SampleReader, length: int, images: int) -> TokenizedSample:
    """Make a stand-in for a sample that cannot be read: its image slots, then padding; nothing is supervised."""
    tokenizer, slots = reader.tokenizer, reader.image_tokens
    image = [tokenizer.img_start, *[tokenizer.img_pad] * slots, tokenizer.img_end]
    tokens = image * images
    tokens += [tokenizer.eos] * (length - len(tokens))
    image_starts = [number * len(image) + 1 for number in range(images)]
    return TokenizedSample(tokens, [False] * length, image_starts)


def _pixels(placement: Placement, samples: SampleTable, reader: SampleReader, bad: dict[int, str]) -> Tensor:
    """Read the images of all samples in their order, uint8 `[num_images, 3, S, S]`."""
    side = reader.sampler.data.image_size
    images: list[NDArray[np.uint8]] = [np.empty((0, 3, side, side), dtype=np.uint8)]
    for ordinal, row in enumerate(placement.rows):
        count = int(samples.images[row])
        if not count:
            continue
        try:
            images.append(reader.pixels(samples, row))
        except SampleError as error:
            images.append(np.zeros((count, 3, side, side), dtype=np.uint8))
            bad[ordinal] = "; ".join(filter(None, (bad.get(ordinal), str(error))))
    return torch.from_numpy(np.concatenate(images))
