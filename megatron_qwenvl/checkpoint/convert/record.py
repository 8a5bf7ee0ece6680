"""Record of a conversion in its result, by which a requeued job finds that there is nothing left to do.

It holds the command, its settings, and the digests of all that was read. Paths are not part of it, only the content
below them. Loaders of the Hugging Face format ignore the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.file_checks import OnBytes, no_progress
from megatron_qwenvl.checkpoint.storage.manifest import MODEL_FOLDER, Manifest
from megatron_qwenvl.checkpoint.storage.new_directory import MAKER_NAME
from megatron_qwenvl.checkpoint.storage.reading import read_blocks
from megatron_qwenvl.checkpoint.storage.writing import write_bytes
from megatron_qwenvl.runtime.listing import entries_below

from .jobs import count_bytes, run_jobs

CONVERSION_RECORD = "conversion.json"


class Conversion(BaseModel):
    """Request for a conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: str
    """Name of the command, such as `next-stage`."""
    settings: dict[str, Any]
    """Its arguments that are no paths; JSON values."""
    sources: dict[str, str]
    """Digests of everything that it reads, by the role or name of the file."""


class _Record(Conversion):
    files: dict[str, int]
    """Bytes of every file of the result, by relative path."""


def digest_weights(manifest: Manifest) -> str:
    """Digest of a checkpoint's weights and of their description, from the manifest alone."""
    # Without defaults, so that a field which a later version adds changes nothing.
    description = manifest.model_dump(
        mode="json", by_alias=True, exclude={"files", "parallel_sizes", "progress"}, exclude_defaults=True
    )
    files = {name: record.sha256 for name, record in manifest.files_in(MODEL_FOLDER).items()}
    return hashlib.sha256(json.dumps([description, files], sort_keys=True).encode()).hexdigest()


def digest_files(files: Mapping[str, Path], on_bytes: OnBytes = no_progress) -> dict[str, str]:
    """Compute the digests of files, by the given names; reads all of them, in a few processes."""
    return dict(zip(files, run_jobs(_digest, list(files.values()), on_bytes), strict=True))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for block in read_blocks(path):
        digest.update(block)
        count_bytes(len(block))
    return digest.hexdigest()


def write_record(directory: Path, conversion: Conversion | None) -> None:
    """Write the record into a result that is otherwise complete; None: there is to be no record."""
    if conversion is None:
        return
    record = _Record(**conversion.model_dump(), files=_sizes(directory))
    write_bytes(directory / CONVERSION_RECORD, record.model_dump_json(indent=1).encode())


def is_done(
    out: Path, command: str, settings: dict[str, Any], digest_sources: Callable[[], dict[str, str]]
) -> bool:
    """Whether `out` is the complete result of exactly this conversion; False if nothing is there.

    Args:
        out: where the result belongs.
        command: as in `Conversion`.
        settings: as in `Conversion`.
        digest_sources: computes `Conversion.sources`; may read a lot, and is called only if that decides.

    Raises:
        CheckpointError: something else is there: the result of another conversion, or of sources that have changed
            since, an incomplete one, or files of unknown origin.
    """
    if not out.exists():
        return False
    record = _read_record(out)
    exists = f"{out}: exists already"
    was, now = {"command": record.command, **record.settings}, {"command": command, **settings}
    if changed := _differing(was, now):
        changes = [f"{name} was {was.get(name)}, now {now.get(name)}" for name in changed]
        raise CheckpointError(f"{exists}, made otherwise: {'; '.join(changes)}; {_REMEDY}")
    if changed := _differing(record.sources, digest_sources()):
        raise CheckpointError(
            f"{exists}, but its source has moved on: {', '.join(changed)} changed since; {_REMEDY}"
        )
    sizes = _sizes(out)
    for name, size in record.files.items():
        if sizes.get(name) != size:
            found = f"found {sizes[name]}" if name in sizes else "missing"
            raise CheckpointError(
                f"{exists}, but {name} is damaged: expected {size} bytes, {found}; {_REMEDY}"
            )
    return True


_REMEDY = "choose another name or remove it"


def _read_record(out: Path) -> _Record:
    try:
        return _Record.model_validate_json((out / CONVERSION_RECORD).read_bytes())
    except OSError:
        why = f"without a {CONVERSION_RECORD} it is no complete conversion's; one that found NaN leaves none"
        raise CheckpointError(f"{out}: exists already; {_REMEDY} ({why})") from None
    except ValidationError:
        raise CheckpointError(
            f"{out}: exists already, and its {CONVERSION_RECORD} is damaged; {_REMEDY}"
        ) from None


def _sizes(directory: Path) -> dict[str, int]:
    return {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(entries_below(directory))
        if path.is_file() and path.name not in (CONVERSION_RECORD, MAKER_NAME)
    }


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys([*a, *b]) if a.get(name) != b.get(name)]
