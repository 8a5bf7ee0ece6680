"""Chunks in which tensors are stored in this project's checkpoints."""

from __future__ import annotations

import math
import re

from megatron_qwenvl.architecture.tower import Shape

_COLUMN_PARALLEL = re.compile(
    r"(linear_qkv|linear_fc1|adapter\.linear_[qkv])\.(weight|bias)$|word_embeddings\.weight$|^output_layer\.weight$"
)
_ROW_PARALLEL = re.compile(r"(linear_proj|linear_fc2)\.weight$")


def chunk_grid(name: str, shape: Shape) -> tuple[int, int]:
    """Choose the axis and the number of chunks of a stored tensor, so that a rank of a tensor-parallel run of up to 8
    reads little more than its own shard. Any parallel layout can read any chunks."""
    if _ROW_PARALLEL.search(name):
        return 1, math.gcd(shape[1], 8)
    if _COLUMN_PARALLEL.search(name):
        gated = name.startswith("decoder.") and "linear_fc1" in name
        return 0, math.gcd(shape[0], 16 if gated else 8)
    return 0, 1
