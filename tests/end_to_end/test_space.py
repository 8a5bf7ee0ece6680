"""The estimated size of a checkpoint against a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_qwenvl.checkpoint.run.space import checkpoint_bytes, checkpoints_to_come
from megatron_qwenvl.checkpoint.storage.manifest import read_manifest
from megatron_qwenvl.checkpoint.storage.run_folder import find_checkpoint
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.model.layers import is_frozen
from megatron_qwenvl.model.shapes import tensor_shapes
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks

from .training_cases import run_config, train, write_data

OVERHEAD = 4096
"""Bytes of headers and index per saved tensor: 2.3 kB of header and 0.4 kB of index were measured."""


def train_only(process: ProcessInfo, config: RunConfig) -> None:
    train(process, config)


def saved_tensors(config: RunConfig) -> int:
    """Weights, and master weight and two moments of what is trained."""
    keys = tensor_shapes(config.model)
    return len(keys) + 3 * sum(not is_frozen(key, config.train.frozen) for key in keys)


@pytest.mark.parametrize(
    "settings",
    [
        ["--train.precision", "fp32"],
        ["--train.precision", "fp32", "--optimizer.sharded", "false"],
        ["--train.precision", "bf16", "--train.frozen", "[decoder]"],
    ],
)
def test_a_saved_checkpoint_is_as_large_as_estimated(tmp_path: Path, settings: list[str]) -> None:
    """To 4 kB per tensor: a few percent of this model, nothing of a full-size one."""
    write_data(tmp_path)
    size = [
        "--model.decoder.hidden",
        "96",
        "--model.decoder.vocab_size",
        "4096",
        "--model.vision.width",
        "96",
    ]
    config = run_config(tmp_path, tmp_path / "run", "--train.stop_after", "3", *size, *settings)
    run_ranks(1, train_only, config)
    saved = read_manifest(find_checkpoint(tmp_path / "run")).total_bytes
    estimated = checkpoint_bytes(config)
    assert estimated < saved < estimated + OVERHEAD * saved_tensors(config)


def test_a_full_size_checkpoint_needs_14_bytes_for_each_trained_element() -> None:
    config = RunConfig()
    billions = checkpoint_bytes(config) / 1e9
    assert billions == pytest.approx(14 * 9.66, rel=0.01)


def test_one_more_checkpoint_than_is_kept() -> None:
    config = RunConfig()
    assert config.checkpoint.keep_last == 3
    assert [checkpoints_to_come(config, kept) for kept in (0, 1, 3, 9)] == [4, 3, 1, 1]
