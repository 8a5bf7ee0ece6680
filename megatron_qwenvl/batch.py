"""Typed micro-batch, the interface between `data/`, which makes it, and `model/`, which reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED_TASK = 255
"""Task id of positions that carry no loss."""


@dataclass
class Batch:
    """One packed micro-batch of T decoder positions and `num_images` images.

    A field that needs sample bytes is None on a pipeline stage that does not use it (see `DataNeeds`).

    Attributes:
        cu_seqlens: int32 `[segments + 1]`, boundaries of the attention segments, first 0, last T. Padding at
            the end is a segment of its own (or belongs to the last one under interleaved packing).
        position_ids: int64 `[T]`, rotary position of every token; restarts at 0 with each segment.
        num_images: images in the micro-batch.
        image_starts: int64 `[num_images]`, position of the first of the `image_tokens` slots of each image,
            in the order of `pixels`; None without `tokens`.
        tokens: int64 `[T]`; image slots hold `<imgpad>`. Needed on the pipeline stage of the word embedding.
        labels: int64 `[T]`, the next token of each position; needed on the pipeline stage of the loss.
        loss_mask: float32 `[T]`, 1 where the position's label is supervised.
        task_ids: uint8 `[T]`, index into `TASKS` (`data/records/tasks.py`) of a supervised position, else
            `IGNORED_TASK`.
        sample_ids: int32 `[T]`, ordinal of the sample within the micro-batch, -1 for padding. Used to mask the
            loss of a sample whose image is unreadable.
        pixels: uint8 RGB `[num_images, 3, S, S]`, resized but not normalized (a quarter of the bytes between
            processes; the patch embedding normalizes); needed on the pipeline stage of the patch embedding.
        bad_samples: ordinals of samples of this micro-batch that could not be read on this rank; their loss
            must be masked on every rank.
        bad_reasons: name of the sample and reason, for each of `bad_samples`.
        bad_names: shard and key of each of `bad_samples`.
        repeated_reads: reads of this micro-batch, or of indices for it, that had to be repeated, one line each.
        real_tokens: positions that are not padding.
        max_segment: length of the longest segment; computed from `cu_seqlens` while that is on the CPU.
    """

    cu_seqlens: Tensor
    position_ids: Tensor
    num_images: int
    image_starts: Tensor | None
    num_samples: int
    tokens: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    task_ids: Tensor | None = None
    sample_ids: Tensor | None = None
    pixels: Tensor | None = None
    bad_samples: tuple[int, ...] = ()
    bad_reasons: tuple[str, ...] = ()
    bad_names: tuple[tuple[str, str], ...] = ()
    repeated_reads: tuple[str, ...] = ()
    real_tokens: int = 0
    max_segment: int = 0

    def __post_init__(self) -> None:
        if not self.max_segment:
            self.max_segment = int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    @property
    def length(self) -> int:
        """Decoder positions T, padding included."""
        return self.position_ids.numel()

    def to(self, device: torch.device) -> Batch:
        """Copy every tensor to `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy every tensor to page-locked memory, for asynchronous copies to a GPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        fields: dict[str, Any] = {
            name: function(value) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**fields)


@dataclass(frozen=True)
class DataNeeds:
    """Fields of a sample that a rank's pipeline stage needs."""

    pixels: bool = True
    """The pipeline stage holds the patch embedding."""
    tokens: bool = True
    """The pipeline stage holds the word embedding or the loss (tokens and labels come from the same bytes)."""
