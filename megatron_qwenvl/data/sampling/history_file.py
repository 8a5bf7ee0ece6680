"""The history of a run's data in a checkpoint: JSON, with every list of shards once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.runtime.retry import retry_read

from .epochs import Edition, ShardList
from .history import DataHistory, Segment, SkippedRange, SourceState, Timeline

DATA_RECORD_NAME = "data.json"
"""Name of the file in a checkpoint."""
FORMAT = 1


def encode_history(history: DataHistory, step: int) -> bytes:
    """Encode a history for the checkpoint at `step`; `consumed` in it is for people, as it follows from the rest."""
    lists: dict[ShardList, int] = {}
    editions = {
        name: [
            {
                "shards": lists.setdefault(edition.shards, len(lists)),
                "seed": edition.seed,
                "window": edition.window,
                "epoch": edition.epoch,
                "taken": edition.taken,
            }
            for edition in of_source
        ]
        for name, of_source in history.editions.items()
    }
    record = {
        "format": FORMAT,
        "step": step,
        "consumed": Timeline(history).consumed(step),
        "skip_steps": history.skip_steps,
        "segments": [_encode_segment(segment) for segment in history.segments],
        "editions": editions,
        "shard_lists": [vars_of(shards) for shards in lists],
    }
    return json.dumps(record).encode()


def _encode_segment(segment: Segment) -> dict[str, Any]:
    return {
        "first_step": segment.first_step,
        "samples_per_step": segment.samples_per_step,
        "stream": segment.stream,
        "sources": [vars(source) for source in segment.sources],
        "left_out": [vars(some) for some in segment.skipped_ranges],
    }


def vars_of(shards: ShardList) -> dict[str, Any]:
    """Return the columns of a list of shards."""
    return {"names": shards.names, "counts": shards.counts, "digests": shards.digests}


def read_history(checkpoint: Path) -> DataHistory | None:
    """Read the history of a checkpoint; None if it has none.

    Raises:
        DataError: it cannot be read.
    """
    path = checkpoint / DATA_RECORD_NAME
    try:
        content = retry_read(path, path.read_bytes)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return decode_history(content, str(path))


def decode_history(content: bytes, place: str) -> DataHistory:
    """Decode a history.

    Args:
        content: of the file.
        place: where it came from, for messages.

    Raises:
        DataError: it is of another format or not such a record.
    """
    try:
        record = json.loads(content)
        if record["format"] != FORMAT:
            raise DataError(f"{place}: expected format {FORMAT}, found {record['format']}")
        lists = [
            ShardList(tuple(some["names"]), tuple(some["counts"]), tuple(some["digests"]))
            for some in record["shard_lists"]
        ]
        editions = {
            name: tuple(Edition(**{**edition, "shards": lists[edition["shards"]]}) for edition in of_source)
            for name, of_source in record["editions"].items()
        }
        segments = tuple(_decode_segment(segment) for segment in record["segments"])
        return DataHistory(segments, editions, tuple((a, b) for a, b in record["skip_steps"]))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{place}: not the record of a run's data: {error!r}") from error


def _decode_segment(record: dict[str, Any]) -> Segment:
    return Segment(
        record["first_step"],
        record["samples_per_step"],
        record["stream"],
        tuple(SourceState(**source) for source in record["sources"]),
        tuple(
            SkippedRange((some["steps"][0], some["steps"][1]), tuple((a, b) for a, b in some["ranges"]))
            for some in record["left_out"]
        ),
    )
