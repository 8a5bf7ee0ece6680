"""The model of Transformer Engine layers and the one of local layers read and write one checkpoint."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_qwenvl.config.schema import RuntimeConfig
from megatron_qwenvl.engine.backends import KernelName, LayerBackend
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.model.build import build_stage, named_tensors, parameter_keys
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks
from tests.distributed.model_cases import small_config

pytestmark = pytest.mark.slow

Description = dict[str, Any]


def describe_rank(process: ProcessInfo, kernels: KernelName) -> Description:
    """What checkpoint and engine know of a small model under tensor and sequence parallelism, on this rank.

    Returns:
        `tensors`: sorted key, full shape, offset, own shape and dtype of everything that is saved (a gated MLP's
        two halves apart); `marks`: by key, the parameter's shape and whether it is marked as cut over
        tensor-parallel ranks and as used on a part of the sequence; `transformer_engine`: its classes in use.
    """
    config = small_config(tensor=2, sequence_parallel=True)
    config = config.model_copy(update={"runtime": RuntimeConfig(device="cpu")})
    runtime = dataclasses.replace(start_engine(config, process), kernels=LayerBackend(kernels))
    stage = build_stage(config, runtime, make_partition(config, runtime.data_size))
    classes = {type(module) for module in stage.modules()}
    return {
        "tensors": sorted(
            [key, [*part.global_shape], [*part.global_offset], [*part.local_shape], str(part.dtype)]
            for key, part in named_tensors(stage)
        ),
        "marks": {
            key: {
                "shape": [*parameter.shape],
                "tensor_model_parallel": bool(getattr(parameter, "tensor_model_parallel", False)),
                "sequence_parallel": bool(getattr(parameter, "sequence_parallel", False)),
            }
            for parameter, key in parameter_keys(stage).items()
        },
        "transformer_engine": sorted(
            kind.__name__
            for kind in classes
            if any("transformer_engine" in base.__module__ for base in kind.__mro__)
        ),
    }


@pytest.fixture(scope="module")
def local() -> list[Description]:
    return run_ranks(2, describe_rank, "torch")


@pytest.fixture(scope="module")
def transformer_engine() -> list[Description]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.te_contract_probe"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


def test_each_model_is_made_of_its_own_kernels(
    local: list[Description], transformer_engine: list[Description]
) -> None:
    expected = ["TEDotProductAttention", "TELayerNormColumnParallelLinear", "TERowParallelLinear"]
    for rank in range(2):
        assert local[rank]["transformer_engine"] == []
        assert {*expected, "RMSNorm"} <= {*transformer_engine[rank]["transformer_engine"]}


@pytest.mark.parametrize("rank", [0, 1])
def test_saved_tensors_are_the_same(
    rank: int, local: list[Description], transformer_engine: list[Description]
) -> None:
    assert transformer_engine[rank]["tensors"] == local[rank]["tensors"]


@pytest.mark.parametrize("rank", [0, 1])
def test_marks_that_the_engine_reads_are_the_same(
    rank: int, local: list[Description], transformer_engine: list[Description]
) -> None:
    """The gradient norm counts cut tensors on every rank; gradients of the others are summed where marked."""
    assert transformer_engine[rank]["marks"] == local[rank]["marks"]


def test_a_tensor_is_marked_as_cut_exactly_where_it_is(transformer_engine: list[Description]) -> None:
    full = {key: shape for key, shape, _, _, _ in transformer_engine[0]["tensors"]}
    for key, mark in transformer_engine[0]["marks"].items():
        assert mark["tensor_model_parallel"] == (mark["shape"] != full[key]), key
