"""The index of one shard: all that sampling and reading need, without opening the samples.

It lies beside its shard (`000000.tar` -> `000000.index.npz`) as compressed plain arrays, no pickles. Text
lengths leave the image slots out, so one index serves every image length and resolution.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import tempfile
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.records.tasks import TASKS
from megatron_qwenvl.data.rendering.renderer import RENDERING_VERSION
from megatron_qwenvl.data.rendering.token_builder import ImageInfo, RenderOptions
from megatron_qwenvl.runtime.retry import retry_read

from .tar import Member

FORMAT_VERSION = 2

COLUMNS: dict[str, Any] = {
    "keys": np.bytes_, "tasks": np.uint8, "text_suffixes": np.bytes_, "text_offsets": np.int64,
    "text_sizes": np.int64, "text_checksums": np.uint32, "text_tokens": np.int32, "image_first": np.int64,
    "image_checksums": np.uint32, "image_suffixes": np.bytes_,
    "image_offsets": np.int64, "image_sizes": np.int64, "widths": np.int32, "heights": np.int32,
    "skipped_keys": np.bytes_, "skipped_reasons": np.bytes_, "noted_keys": np.bytes_, "notes": np.bytes_,
}  # fmt: skip


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, N of them with I images in all.

    Attributes:
        shard: file name of the shard.
        size: its size in bytes.
        modified: its modification time in ns, when it was indexed.
        digest: its BLAKE2b-128 digest.
        tokenizer: fingerprint of the tokenizer behind `text_tokens`.
        options: how the records were rendered where there is a choice.
        images_verified: whether every image was decoded.
        arrays: `keys` [N] UTF-8; `tasks` uint8 [N]; `text_suffixes`, `text_offsets`, `text_sizes` [N] of the
            record (`json`) or plain caption (`txt`); `text_checksums` uint32 [N], CRC-32 of its bytes;
            `image_checksums` uint32 [N], CRC-32 of the bytes of its images one after the other;
            `text_tokens` int32 [N], length without image slots;
            `image_first` int64 [N + 1], rows of a sample in the image arrays; `image_suffixes`,
            `image_offsets`, `image_sizes`, `widths`, `heights` [I], in the order in which the text shows
            them; `skipped_keys`, `skipped_reasons` of samples that cannot be used; `noted_keys`, `notes` of images
            whose pixels may differ from those that another viewer shows (`images.py`).
    """

    shard: str
    size: int
    modified: int
    digest: str
    tokenizer: str
    options: RenderOptions
    images_verified: bool
    arrays: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.arrays["keys"])

    @property
    def image_counts(self) -> NDArray[np.int64]:
        """Images of each sample, [N]."""
        return np.diff(self.arrays["image_first"])

    @property
    def largest_images(self) -> NDArray[np.int64]:
        """Pixels of the largest image of each sample, [N]; 0 without images."""
        pixels = np.append(self.arrays["widths"].astype(np.int64) * self.arrays["heights"], 0)
        first = self.arrays["image_first"]
        return (
            np.where(np.diff(first) > 0, np.maximum.reduceat(pixels, first[:-1]), 0)
            if len(self)
            else first[:0]
        )

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        return str(self.arrays["keys"][row].decode())

    def text_member(self, row: int) -> tuple[str, Member]:
        """Return file name and place of a sample's record or plain caption."""
        arrays = self.arrays
        name = f"{self.key(row)}.{arrays['text_suffixes'][row].decode()}"
        return name, Member(int(arrays["text_offsets"][row]), int(arrays["text_sizes"][row]))

    def images(self, row: int) -> list[tuple[ImageInfo, Member]]:
        """Return name, size and place of a sample's images."""
        arrays = self.arrays
        return [
            (
                ImageInfo(
                    arrays["image_suffixes"][i].decode(), int(arrays["widths"][i]), int(arrays["heights"][i])
                ),
                Member(int(arrays["image_offsets"][i]), int(arrays["image_sizes"][i])),
            )
            for i in range(arrays["image_first"][row], arrays["image_first"][row + 1])
        ]


def index_path(shard: Path) -> Path:
    """Return the path of a shard's index."""
    return shard.with_name(f"{shard.name.removesuffix('.tar')}.index.npz")


def index_command(directory: Path, vocabulary: str | None = None, *options: str) -> str:
    """Write the command that indexes a directory, ready to be pasted into a shell.

    Args:
        directory: holds the shards.
        vocabulary: the tokenizer's file; none: the byte-level one.
        options: further options of the tool.
    """
    tokenizer = ["--tokenizer", vocabulary] if vocabulary else []
    return shlex.join([*_indexing_program(), str(directory), *tokenizer, *options])


def _indexing_program() -> list[str]:
    """Command of the indexing tool: the script of a checkout, or the console script of an installed package."""
    script = "tools/index_shards.py"
    return ["python", script] if (Path(__file__).parents[3] / script).is_file() else ["qwenvl-index"]


def file_digest(file: BinaryIO) -> str:
    """Compute BLAKE2b-128 of a file from its start; the position is left at the start."""
    digest = hashlib.blake2b(digest_size=16)
    file.seek(0)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    file.seek(0)
    return digest.hexdigest()


def save_index(index: ShardIndex, directory: Path) -> None:
    """Write the index beside its shard, whole or not at all."""
    header = {name: value for name, value in vars(index).items() if name != "arrays"}
    header["options"] = asdict(index.options)
    buffer = io.BytesIO()
    made_by = {"format": FORMAT_VERSION, "rendering": RENDERING_VERSION, "task_names": TASKS}
    arrays: dict[str, Any] = {"meta": np.bytes_(json.dumps({**made_by, **header}))}
    np.savez_compressed(buffer, allow_pickle=False, **arrays, **index.arrays)
    write_atomically(index_path(directory / index.shard), buffer.getvalue())


def load_index(shard: Path, vocabulary: str | None = None) -> ShardIndex:
    """Read the index of a shard; its tasks are numbered as in `TASKS`, whatever their numbers were when it was made.

    Args:
        shard: the tar.
        vocabulary: the tokenizer's file, for the command that an error names.

    Raises:
        DataError: the index is missing, damaged, or made by another version of the format or the rendering.
    """
    path = index_path(shard)
    remedy = f"run {index_command(shard.parent, vocabulary)}"
    try:
        content = retry_read(path, path.read_bytes, folder=shard.parent)
        # Numpy would take what is no zip for a pickle, and advise to load that.
        if not zipfile.is_zipfile(io.BytesIO(content)):
            raise zipfile.BadZipFile("not a zip archive")
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            meta = json.loads(bytes(stored["meta"]))
            check_versions(path, meta.pop("format"), meta.pop("rendering", None), remedy)
            names = meta.pop("task_names")
            if unknown := sorted(set(names) - set(TASKS)):
                raise DataError(
                    f"{path}: expected the tasks {', '.join(TASKS)}, found {unknown[0]}; {remedy}"
                )
            arrays = {name: stored[name] for name in COLUMNS}
            arrays["tasks"] = np.array([TASKS.index(name) for name in names], np.uint8)[arrays["tasks"]]
            return ShardIndex(options=RenderOptions(**meta.pop("options")), **meta, arrays=arrays)
    except FileNotFoundError:
        if not shard.parent.is_dir():
            raise DataError(f"{shard.parent}: no such directory of shards") from None
        raise DataError(f"{path}: no index; {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError) as error:
        raise DataError(f"{path}: damaged index: {error}; {remedy}") from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: damaged index: {error}; {remedy}") from error


def check_versions(path: Path, format_: object, rendering: object, remedy: str) -> None:
    """Refuse an index or a manifest that another version of this package made.

    Raises:
        DataError: naming both versions and the command that makes it anew.
    """
    if format_ != FORMAT_VERSION:
        raise DataError(f"{path}: expected index format {FORMAT_VERSION}, found {format_}; {remedy}")
    if rendering != RENDERING_VERSION:
        raise DataError(
            f"{path}: expected the text lengths of rendering version {RENDERING_VERSION}, found {rendering}; {remedy}"
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file, flush it to the disk, rename it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
