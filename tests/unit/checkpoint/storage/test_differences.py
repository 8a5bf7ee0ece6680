"""Comparing tensors block by block, and what an index says about its tensors' chunks."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_qwenvl
from megatron_qwenvl.checkpoint.convert.inspect import verify
from megatron_qwenvl.checkpoint.storage.differences import BLOCK_ELEMENTS, measure_difference
from megatron_qwenvl.engine.checkpoint_index import read_index
from megatron_qwenvl.engine.checkpoint_tensors import DistributedFolder

from ..hf_cases import TINY, random_weights, write_hf

LONG = 3 * BLOCK_ELEMENTS + 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_block_counts(dtype: torch.dtype) -> None:
    a = torch.ones(LONG, dtype=dtype)
    b = a.clone()
    assert (measure_difference(a, b).count, measure_difference(a, b).largest) == (0, 0.0)
    b[0], b[BLOCK_ELEMENTS], b[-1] = 1.5, 3, 2
    found = measure_difference(a, b)
    assert (found.elements, found.count, found.largest) == (LONG, 3, 2.0)
    assert measure_difference(a[1:], b[1:]).count == 2, "also where eight bytes do not divide"
    assert measure_difference(torch.empty(0), torch.empty(0)).count == 0


def test_bits_that_are_not_numbers() -> None:
    a = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0])
    assert (measure_difference(a, a.clone()).count, measure_difference(a, a.clone()).largest) == (0, 0.0)
    b = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1.25])
    assert (measure_difference(a, b).count, measure_difference(a, b).largest) == (2, 0.25)
    assert math.isnan(measure_difference(a, torch.zeros(5)).largest)
    assert measure_difference(torch.tensor([math.inf]), torch.tensor([1.0])).largest == math.inf
    late = torch.zeros(LONG)
    late[3] = math.nan
    assert math.isnan(measure_difference(late, torch.ones(LONG)).largest), "a later block does not hide it"


def test_types_are_compared_by_value() -> None:
    a = torch.tensor([1.0, 1.0 + 2**-10, math.nan])
    found = measure_difference(a, a.bfloat16())
    assert (found.count, found.largest) == (1, 2**-10)


MEMORY = """
import resource, sys, torch
from megatron_qwenvl.checkpoint.convert.compare import compare
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec

class Made:
    def __init__(self, value): self.value = value
    specs = {"x": TensorSpec((1 << 25,), torch.bfloat16)}
    def read(self, name): return torch.full((1 << 25,), self.value, dtype=torch.bfloat16)

def peak(b, tolerance):
    compare(Made(1.0), Made(b), tolerance)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024

equal = peak(1.0, 0.0)
print(*(peak(2.0, tolerance) - equal for tolerance in (0.0, 1e-3, 2.0)))
"""


@pytest.mark.slow
def test_differing_tensors_need_no_more_memory_than_equal_ones() -> None:
    """64 MB each; copies in float32 would be 128 MB each, and 9.5 GB at full size."""
    command = [sys.executable, "-c", MEMORY]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(float(more) < 32 for more in result.stdout.split()), result.stdout


def chunk(offset: int, size: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([offset, 0]), torch.Size([size, 4]))


@pytest.mark.parametrize(
    ("chunks", "places", "good"),
    [
        ([(0, 4), (4, 4)], [0, 4], True),
        ([(0, 8)], [0], True),
        ([(0, 4)], [0], False),
        ([(0, 4), (2, 4)], [0, 2], False),
        ([(0, 4), (0, 4)], [0], False),
        ([(0, 4), (6, 4)], [0, 6], False),
        ([(0, 4), (4, 4)], [0], False),
    ],
    ids=["two", "one", "part missing", "overlap", "the same twice", "outside", "no place"],
)
def test_chunks_must_cover_a_tensor_once(
    tmp_path: Path, chunks: list[tuple[int, int]], places: list[int], good: bool
) -> None:
    entry = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32), torch.Size([8, 4]), [chunk(*c) for c in chunks]
    )
    index = Metadata(
        state_dict_metadata={"x": entry},
        storage_data={MetadataIndex("x", [at, 0]): _StorageInfo("a.distcp", 0, 1) for at in places},
        storage_meta=StorageMeta(),
    )
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    assert DistributedFolder(tmp_path).uncovered() == ([] if good else ["x"])


def test_verify_tells_a_missing_object_s_file(tmp_path: Path) -> None:
    """An object that the index places in a file that is not there; everything else is reported as well."""
    execute_import(plan_qwenvl(write_hf(tmp_path / "p", TINY, random_weights(TINY))), tmp_path / "megatron")
    folder = tmp_path / "megatron/model"
    index = read_index(folder)
    index.state_dict_metadata["object"] = BytesStorageMetadata()
    index.storage_data[MetadataIndex("object")] = _StorageInfo("gone.distcp", 0, 9)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    problems = verify(tmp_path / "megatron")
    assert any(
        problem.endswith("gone.distcp: cannot be read (No such file or directory)") for problem in problems
    )
    assert any("gone.distcp: missing, but the index refers to it" in problem for problem in problems)
    assert any(".metadata: expected" in problem for problem in problems)
