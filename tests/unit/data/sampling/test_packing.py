from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_qwenvl.data.sampling.packing import (
    CostWeights,
    Pack,
    balance_across_ranks,
    make_packs,
    pack_costs,
)
from megatron_qwenvl.data.sampling.sample_table import SampleTable


def table(
    lengths: Sequence[int], tasks: Sequence[int] | None = None, images: Sequence[int] | None = None
) -> SampleTable:
    """A batch whose samples differ in what matters to packing."""
    zeros = np.zeros(len(lengths), dtype=np.int32)
    return SampleTable(
        source=zeros,
        shard=zeros,
        row=zeros,
        length=np.array(lengths, dtype=np.int32),
        images=np.array(zeros if images is None else images, dtype=np.int32),
        task=np.array(zeros if tasks is None else tasks, dtype=np.uint8),
    )


def stage1_lengths(count: int) -> list[int]:
    """Captions of about 15 to 60 tokens with an image of 258."""
    rng = np.random.default_rng(0)
    return (258 + np.clip(rng.lognormal(3.2, 0.7, count), 5, 250)).astype(int).tolist()


def test_best_fit_takes_the_fullest_pack_that_fits() -> None:
    # Longest first: 7 | 6 | 4 into 6 | 3 into 7 | 2 opens a third
    assert make_packs(table([3, 7, 2, 6, 4]), "isolated", 10) == [(0, 1), (3, 4), (2,)]
    # 3 fits beside 7 and beside 5, and leaves no gap beside 7
    assert make_packs(table([7, 5, 3]), "isolated", 10) == [(0, 2), (1,)]


@pytest.mark.parametrize("packing", ["isolated", "interleaved", "none"])
def test_every_sample_is_in_one_pack_and_no_pack_overflows(packing: str) -> None:
    rng = np.random.default_rng(1)
    samples = table(rng.integers(1, 500, 2000).tolist(), rng.integers(0, 9, 2000).tolist())
    packs = make_packs(samples, packing, 512)  # type: ignore[arg-type]
    assert sorted(row for pack in packs for row in pack) == list(range(2000))
    assert max(samples.length[list(pack)].sum() for pack in packs) <= 512
    assert all(list(pack) == sorted(pack) for pack in packs)
    if packing == "interleaved":
        assert all(len(set(samples.task[list(pack)])) == 1 for pack in packs)
    if packing == "none":
        assert all(len(pack) == 1 for pack in packs)


@pytest.mark.parametrize("packing", ["isolated", "interleaved"])
def test_a_realistic_mixture_fills_packs(packing: str) -> None:
    """Stage 2's sample counts: captions, VQA, grounding with an image, long OCR, pure text."""
    rng = np.random.default_rng(2)
    share = np.array([19.7, 3.6, 3.5, 8.7, 8.7, 24.8, 7.8])
    tasks = rng.choice(7, 4096, p=share / share.sum())
    short = 258 + np.clip(rng.lognormal(3.3, 0.6, 4096), 10, 300)
    ocr = 258 + np.clip(rng.lognormal(6, 0.8, 4096), 50, 1700)
    text = np.clip(rng.lognormal(5.5, 0.9, 4096), 20, 2048)
    lengths = np.select([tasks == 5, tasks == 6], [ocr, text], short).astype(int)
    packs = make_packs(table(lengths.tolist(), tasks.tolist()), packing, 2048)  # type: ignore[arg-type]
    assert lengths.sum() / (2048 * len(packs)) >= 0.95


def test_the_largest_global_batch_packs_in_a_fraction_of_a_second() -> None:
    samples = table(stage1_lengths(30_720))
    start = time.process_time()
    packs = make_packs(samples, "isolated", 4096)
    assert time.process_time() - start < 0.5
    assert samples.length.sum() / (4096 * len(packs)) >= 0.95


def cost_of(dealt: list[list[Pack]], packs: list[Pack], costs: list[float]) -> np.ndarray:
    """Cost of each rank and slot."""
    by_pack = dict(zip(packs, costs, strict=True))
    return np.array([[by_pack.get(pack, 0.0) for pack in rank] for rank in dealt])


@pytest.mark.parametrize("ranks", [1, 3, 8, 32])
def test_dealing_is_balanced(ranks: int) -> None:
    rng = np.random.default_rng(3)
    images = rng.integers(0, 4, 3000)
    samples = table((10 + 66 * images + rng.integers(1, 200, 3000)).tolist(), images=images.tolist())
    packs = make_packs(samples, "isolated", 1024)
    costs = pack_costs(packs, samples, CostWeights.at(448))
    slots = -(-len(packs) // ranks)
    dealt = balance_across_ranks(packs, costs, ranks, slots)
    assert [len(rank) for rank in dealt] == [slots] * ranks
    assert sorted(pack for rank in dealt for pack in rank if pack) == sorted(packs)
    cost = cost_of(dealt, packs, costs)
    totals = cost.sum(axis=1)
    full = cost[:, :-1]
    assert totals.max() - totals.min() <= cost.max()
    assert full.sum(axis=1).max() <= 1.01 * full.sum(axis=1).mean()
    assert ((full.max(axis=0) - full.min(axis=0)) / full.mean(axis=0)).mean() < 0.06


def test_empty_packs_fill_the_last_slot() -> None:
    packs = [(0,), (1,), (2,), (3,), (4,)]
    dealt = balance_across_ranks(packs, [5.0, 4.0, 3.0, 2.0, 1.0], ranks=4, slots=2)
    assert [rank[1] for rank in dealt].count(()) == 3
    assert all(rank[0] for rank in dealt)


def test_costs_weigh_images_and_squares() -> None:
    samples = table([100, 200], images=[1, 0])
    weights = CostWeights(attention=0.01, image=50)
    assert pack_costs([(0,), (1,), (0, 1), ()], samples, weights) == [250, 600, 850, 0]
    assert CostWeights.at(448).image == pytest.approx(4 * CostWeights.at(224).image)
