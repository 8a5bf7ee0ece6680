"""The catalog of a directory of shards: `manifest.json`, written beside the indices.

It repeats the few numbers that a start needs, so that opening 30,000 shards reads one file and lists one directory
instead of reading 30,000 indices.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.rendering.renderer import RENDERING_VERSION
from megatron_qwenvl.data.rendering.token_builder import DEFAULT_OPTIONS, RenderOptions
from megatron_qwenvl.runtime.retry import retry_read

from .index import FORMAT_VERSION, ShardIndex, check_versions, load_index, write_atomically
from .listing import list_shards, unread_shards
from .skipped import SkippedKind

CATALOG_NAME = "manifest.json"
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class CatalogEntry:
    """One shard in the catalog; fields as in `ShardIndex`."""

    name: str
    size: int
    modified: int
    digest: str
    samples: int
    images: int
    skipped: int

    @classmethod
    def of(cls, index: ShardIndex) -> CatalogEntry:
        """Summarize an index."""
        arrays = index.arrays
        return cls(
            index.shard,
            index.size,
            index.modified,
            index.digest,
            len(index),
            len(arrays["widths"]),
            len(arrays["skipped_keys"]),
        )


@dataclass(frozen=True)
class ShardCatalog:
    """The shards of a directory.

    Attributes:
        tokenizer: fingerprint of the tokenizer that counted their text.
        shards: one entry per shard, in the order of their names.
        skipped: why samples were left out, the commonest kind first.
        failed: shards that could not be indexed, with the reason.
        options: how their records were rendered where there is a choice; a run renders them in the same way.
        noted: images whose pixels may differ from those that another viewer shows, the commonest kind first.
    """

    tokenizer: str
    shards: tuple[CatalogEntry, ...]
    skipped: tuple[SkippedKind, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    options: RenderOptions = DEFAULT_OPTIONS
    noted: tuple[SkippedKind, ...] = ()


def save_catalog(catalog: ShardCatalog, directory: Path) -> None:
    """Write the catalog, whole or not at all."""
    content = {"format": FORMAT_VERSION, "rendering": RENDERING_VERSION, **asdict(catalog)}
    write_atomically(directory / CATALOG_NAME, (json.dumps(content, indent=1) + "\n").encode())


def load_catalog(directory: Path, remedy: str) -> ShardCatalog:
    """Read the catalog of a directory.

    Args:
        directory: holds the shards.
        remedy: the end of an error message: the command that indexes the directory.

    Raises:
        DataError: it is missing, damaged, or made by another version.
    """
    path = directory / CATALOG_NAME
    try:
        content = json.loads(retry_read(path, path.read_bytes))
        check_versions(path, content["format"], content.get("rendering"), remedy)
        shards = tuple(CatalogEntry(**entry) for entry in content["shards"])
        skipped = tuple(SkippedKind(**kind) for kind in content["skipped"])
        noted = tuple(SkippedKind(**kind) for kind in content["noted"])
        options = RenderOptions(**content["options"])
        return ShardCatalog(content["tokenizer"], shards, skipped, dict(content["failed"]), options, noted)
    except FileNotFoundError:
        raise DataError(f"{path}: no manifest; {remedy}") from None
    except _DAMAGED as error:
        raise DataError(f"{path}: damaged manifest: {error}; {remedy}") from error


def failed_shards(directory: Path) -> dict[str, str]:
    """Name the shards that could not be indexed last time and are still there, and files that only seem to be shards.

    Returns:
        The reason by file name.

    Raises:
        DataError: the directory cannot be read.
    """
    failed: dict[str, str] = {}
    with contextlib.suppress(*_DAMAGED):
        failed = dict(json.loads((directory / CATALOG_NAME).read_bytes())["failed"])
    there = {name: reason for name, reason in failed.items() if (directory / name).exists()}
    return {**there, **unread_shards(directory)}


def indexed_options(directory: Path) -> RenderOptions:
    """Look up the options with which a directory was indexed last, by whichever version; the defaults if never.

    With them, the command that a message names makes the index anew as its owner wanted it.
    """
    with contextlib.suppress(*_DAMAGED):
        return RenderOptions(**json.loads((directory / CATALOG_NAME).read_bytes())["options"])
    for shard in list_shards(directory):  # the catalog is damaged or missing
        with contextlib.suppress(DataError):
            return load_index(shard).options
    return DEFAULT_OPTIONS
