"""Samples of a step as columns, the limits on them, and the samples beyond the limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SampleLimits:
    """Limits on samples that a run can use.

    Attributes:
        max_length: longest sample in tokens, image slots included.
        image_tokens: slots of one image.
        max_image_pixels: largest image.
    """

    max_length: int
    image_tokens: int
    max_image_pixels: int


@dataclass(frozen=True)
class Skipped:
    """A sample that the sampler left out, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class SampleTable:
    """Columns of N samples, all `[N]`.

    Attributes:
        source: int32, index of the source.
        shard: int32, index of the shard in its directory.
        row: int32, row in the shard's index.
        length: int32, tokens with image slots.
        images: int32, number of images.
        task: uint8, index into `TASKS`.
    """

    source: NDArray[np.int32]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]
    length: NDArray[np.int32]
    images: NDArray[np.int32]
    task: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.source)

    def take(self, rows: Any) -> SampleTable:
        """Take rows, given as an index array or a slice."""
        return SampleTable(**{name: column[rows] for name, column in vars(self).items()})

    @staticmethod
    def concatenate(tables: Sequence[SampleTable]) -> SampleTable:
        """Join tables one after the other."""
        names = vars(tables[0])
        return SampleTable(
            **{name: np.concatenate([getattr(table, name) for table in tables]) for name in names}
        )
