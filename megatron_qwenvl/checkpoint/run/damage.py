"""Search for damaged files of a checkpoint by all ranks together."""

from __future__ import annotations

import heapq
from pathlib import Path

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.file_checks import file_problem
from megatron_qwenvl.checkpoint.storage.manifest import read_manifest
from megatron_qwenvl.checkpoint.storage.writing import FileRecord

from .ranks import Ranks


def find_damage(checkpoint: Path, ranks: Ranks) -> list[str]:
    """List what is wrong with a checkpoint, file by file, the same on all ranks. Collective; every rank digests its
    share of the bytes."""
    found = ranks.all_gather(_damage_of_share(checkpoint, ranks.rank, ranks.size))
    return list(dict.fromkeys(problem for problems in found for problem in problems))


def _damage_of_share(checkpoint: Path, rank: int, ranks: int) -> list[str]:
    """List what is wrong with one rank's share; that a rank cannot read the checkpoint is a problem, too."""
    try:
        own = split_by_bytes(read_manifest(checkpoint).files, ranks)[rank]
        checked = (file_problem(checkpoint / name, record) for name, record in own.items())
        return [problem for problem in checked if problem is not None]
    except (CheckpointError, OSError) as error:
        return [str(error)]


def split_by_bytes(files: dict[str, FileRecord], ranks: int) -> list[dict[str, FileRecord]]:
    """Distribute files over ranks so that all have about the same bytes: the largest first, to the rank with least."""
    shares: list[dict[str, FileRecord]] = [{} for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks)]
    for name, record in sorted(files.items(), key=lambda item: (-item[1].bytes, item[0])):
        size, rank = heapq.heappop(least)
        shares[rank][name] = record
        heapq.heappush(least, (size + record.bytes, rank))
    return shares
