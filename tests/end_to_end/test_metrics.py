"""The figures of a step's record are those of the step plan, each counted once, whatever the layout."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest import approx

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.loading.loader import Step, build_loader
from megatron_qwenvl.engine.start import Runtime, start_engine
from megatron_qwenvl.model.flops import Workload, total_flops
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training import loop
from megatron_qwenvl.training.loop import Trainer
from tests.distributed.harness import run_ranks

from .training_cases import records, run_config, train, write_data

LAYOUTS = {
    "dp1": (1, 1, []),
    "dp2_tp2": (4, 2, ["--parallel.tensor", "2", "--parallel.sequence_parallel", "true"]),
    "dp2_pp2": (4, 2, ["--parallel.pipeline", "2"]),
}
COUNTS = ("samples", "images", "tokens", "padded_tokens", "micro_batches")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def planned(config: RunConfig, data_parallel: int, step: int) -> dict[str, Any]:
    """What the plan says of a step, and the sum of the squared lengths of what attends to itself."""
    loader = build_loader(config, dp_size=data_parallel)
    info, batch = loader.info(step), loader.sampler.global_batch(step)
    packs = [[int(batch.samples.length[row]) for row in pack] for pack in batch.packs]
    if config.data.packing == "interleaved":
        pairs = sum(sum(pack) ** 2 for pack in packs)
    else:
        pairs = sum(length**2 for pack in packs for length in pack)
    counts = (info.samples, info.images, info.tokens, info.positions, info.micro_batches)
    return {**dict(zip(COUNTS, counts, strict=True)), "pairs": pairs}


@pytest.mark.parametrize("packing", ["none", "isolated", "interleaved"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_are_the_plans(layout: str, packing: str, data: Path, tmp_path: Path) -> None:
    ranks, data_parallel, parallel = LAYOUTS[layout]
    options = ["--data.packing", packing, "--train.gradient_accumulation", "2", "--train.stop_after", "2"]
    sizes = ["--data.max_sample_length", "256", "--data.pack_length", "256", "--data.global_batch_size", "24"]
    config = run_config(data, tmp_path, *options, *sizes, *parallel, world=ranks)
    run_ranks(ranks, train, config)
    found = records(tmp_path)
    assert len(found) == 2 and any(record["samples"] != record["images"] for record in found)
    for step, record in enumerate(found):
        expected = planned(config, data_parallel, step)
        assert {name: record[name] for name in COUNTS} == {name: expected[name] for name in COUNTS}
        assert record["padding"] == approx(1 - expected["tokens"] / expected["padded_tokens"])
        work = Workload(expected["images"], 16, expected["tokens"], expected["pairs"], record["loss_tokens"])
        assert record["flops"] == total_flops(config.model, config.train.frozen, work)
        seconds = record["seconds"]
        assert record["samples_per_second"] == approx(expected["samples"] / seconds)
        assert record["images_per_second"] == approx(expected["images"] / seconds)
        assert record["tokens_per_second"] == approx(expected["tokens"] / seconds)
        assert record["tflops_per_device"] == approx(record["flops"] / seconds / ranks / 1e12)
        assert record["mfu"] is None  # no peak is known of a CPU
    (start,) = records(tmp_path, "start")
    assert (start["processes"], start["data_parallel"], start["step"]) == (ranks, data_parallel, 0)


class SlowLoader:
    """Steps that come `delay` seconds late by the clock of this rank's training loop, which runs ahead."""

    def __init__(self, steps: Any, delay: float) -> None:
        self._steps = steps
        self.sampler = steps.sampler
        self._delay = delay
        self._ahead = 0.0
        loop.time = self  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[Step]:
        for step in self._steps:
            self._ahead += self._delay
            yield step

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead


def train_unequally(process: ProcessInfo, config: RunConfig, delay: float) -> None:
    """Train with data that comes late and 7 terabytes in use on the last rank."""
    trainer = Trainer.build(config, start_engine(config, process))
    if process.rank == process.world_size - 1:
        trainer.loader = SlowLoader(trainer.loader, delay)  # type: ignore[assignment]
        Runtime.peak_memory_bytes = lambda self: 7 * 10**12  # type: ignore[method-assign]
    trainer.run()


def test_the_rank_that_is_worst_off_counts(data: Path, tmp_path: Path) -> None:
    config = run_config(data, tmp_path, "--train.stop_after", "2", "--parallel.pipeline", "2", world=2)
    run_ranks(2, train_unequally, config, 1000.0)
    for record in records(tmp_path):
        assert record["peak_memory_bytes"] == 7 * 10**12
        # The delay lies inside the step's time, also where another rank than the one that waits writes it down.
        assert record["data_wait"] * record["seconds"] >= 1000
        assert record["data_wait"] <= 1


def test_only_logged_steps_are_recorded(data: Path, tmp_path: Path) -> None:
    run_ranks(2, train, run_config(data, tmp_path, "--logging.interval", "4", world=2))
    assert [record["step"] for record in records(tmp_path)] == [3, 7]


def test_nothing_is_saved_where_nothing_is_to_be_kept(data: Path, tmp_path: Path) -> None:
    options = ["--checkpoint.save", "false", "--checkpoint.interval", "2", "--train.stop_after", "5"]
    results = run_ranks(2, train, run_config(data, tmp_path, *options, world=2))
    assert [result["progress"].step for result in results] == [5, 5]
    assert records(tmp_path, "save") == []
    assert not list((tmp_path / "checkpoints").glob("*"))
