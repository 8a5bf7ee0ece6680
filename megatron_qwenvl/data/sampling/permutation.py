"""Permutations that are a pure function of their key.

Randomness is a hash of (seed, source, epoch, window, index), so it does not depend on the version of a random number
library.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def hash64(*key: object) -> int:
    """Hash a key to 64 bits that depend on every part of it and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def permutation(length: int, *key: object) -> NDArray[np.int64]:
    """Permute `0..length-1` by the order of SplitMix64 hashes, which depend on `key` alone; int64 `[length]`."""
    x = np.uint64(hash64(*key)) + np.arange(length, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")
