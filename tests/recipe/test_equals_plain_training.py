"""Eight steps of each stage, warm-up and whole cosine, by the real trainer and by the paper's recipe in plain PyTorch.

The numbers of `runs.STAGES` are chosen so that every part of the recipe shows in the weights: the limit of the norm
lies between the norms of the steps, the floor and the layers' rates are far apart, the micro-batches of a step differ
in tokens. `tests/mutants` breaks the recipe piece by piece and checks that these tests notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_qwenvl.config.schema import ModelConfig

from .plain_samples import Example
from .plain_training import Trained
from .runs import STAGES, Result, as_hf, make_config, packs_of, run_plain, run_product, write_examples

# Of weights that move by 0.003 to 0.01 in the eight steps; seen: 1.4e-6 (the keys' biases, whose gradients are rounding
# alone), 3e-7 for the others.
WEIGHTS = 2.6e-6
# Relative, of losses of 5 to 6 and norms of 0.1 to 2; seen: 2e-7.
LOSS_AND_NORM = 7e-7

LAYOUTS = {
    "tp2_pp2_sp": (  # cut inside the ViT, whose layers learn at different rates
        4,
        [
            *("--parallel.tensor", "2", "--parallel.sequence_parallel", "true"),
            *("--parallel.pipeline", "2", "--parallel.layout", "[2]"),
        ],
    ),
    "dp2": (2, []),
    "dp2_unsharded": (2, ["--optimizer.sharded", "false"]),
}


@dataclass(frozen=True)
class Runs:
    """The data of a stage on disk, and its run on one process."""

    root: Path
    examples: list[Example]
    product: Result


RunsOf = Callable[[str], Runs]
PlainOf = Callable[[str], Trained]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> RunsOf:
    """The runs of a stage; made once."""

    @cache
    def of(stage: str) -> Runs:
        root = tmp_path_factory.mktemp(stage)
        made = write_examples(stage, root)
        return Runs(root, made, run_product(make_config(stage, root, root / "one")))

    return of


@pytest.fixture(scope="module")
def plain(runs: RunsOf) -> PlainOf:
    """The plain recipe's run of a stage on the same samples from the same weights; made once."""

    @cache
    def of(stage: str) -> Trained:
        one = runs(stage)
        return run_plain(
            stage, make_config(stage, one.root, one.root / "plain"), one.examples, one.product.before
        )

    return of


def column(result: Result, name: str) -> list[float]:
    return [step[name] for step in result.steps]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    apart = {name: float((found[name] - expected[name]).abs().max()) for name in expected}
    assert not {name: difference for name, difference in apart.items() if not difference < WEIGHTS}


def assert_trained_as(product: Result, expected: Trained, model: ModelConfig) -> None:
    assert column(product, "lr") == pytest.approx(expected.rates, rel=1e-9)
    assert column(product, "loss") == pytest.approx(expected.losses, rel=LOSS_AND_NORM)
    assert column(product, "grad_norm") == pytest.approx(expected.norms, rel=LOSS_AND_NORM)
    weights = as_hf(product.after, model)
    assert_close({name: weights[name] for name in expected.weights}, expected.weights)


@pytest.mark.parametrize("stage", STAGES)
def test_training_is_the_papers(stage: str, runs: RunsOf, plain: PlainOf) -> None:
    one = runs(stage)
    model = make_config(stage, one.root, one.root / "plain").model
    assert_trained_as(one.product, plain(stage), model)


def test_what_is_switched_off_does_nothing(runs: RunsOf) -> None:
    """No clipping, warm-up, weight decay, floor or layer-wise decay."""
    one = runs("stage2")
    off = (
        *("--train.clip_grad", "0", "--optimizer.warmup_steps", "0", "--optimizer.weight_decay", "0"),
        *("--optimizer.min_lr", "0", "--optimizer.vit_layer_decay", "1.0"),
    )
    recipe = replace(
        STAGES["stage2"].recipe, clip=math.inf, warmup=0, weight_decay=0.0, floor=0.0, layer_decay=1.0
    )
    config = make_config("stage2", one.root, one.root / "off", *off)
    expected = run_plain("stage2", config, one.examples, one.product.before, recipe)
    assert_trained_as(run_product(config), expected, config.model)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_layout_trains_the_same(stage: str, layout: str, runs: RunsOf) -> None:
    one, (ranks, overrides) = runs(stage), LAYOUTS[layout]
    found = run_product(make_config(stage, one.root, one.root / layout, *overrides, world=ranks), ranks)
    assert column(found, "loss") == pytest.approx(column(one.product, "loss"), rel=LOSS_AND_NORM)
    assert column(found, "grad_norm") == pytest.approx(column(one.product, "grad_norm"), rel=LOSS_AND_NORM)
    assert column(found, "loss_tokens") == column(one.product, "loss_tokens")
    assert column(found, "lr") == column(one.product, "lr")
    assert all(torch.equal(found.before[name], one.product.before[name]) for name in one.product.before)
    assert_close(found.after, one.product.after)


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parts_stay_and_all_others_move(stage: str, runs: RunsOf) -> None:
    """Bit for bit, and by 0.001 at least."""
    one = runs(stage)
    model = make_config(stage, one.root, one.root / "plain").model
    before, after = (as_hf(weights, model) for weights in (one.product.before, one.product.after))
    constant = "transformer.visual.attn_pool.pos_embed"
    for name in before.keys() - {constant}:
        if STAGES[stage].recipe.frozen(name):
            assert torch.equal(before[name], after[name]), name
        else:
            assert (before[name] - after[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("stage", STAGES)
def test_the_steps_can_show_the_recipe(stage: str, runs: RunsOf, plain: PlainOf) -> None:
    """Some steps are clipped, others are not, nor at twice the limit; micro-batches differ in supervised tokens."""
    one, recipe = runs(stage), STAGES[stage].recipe
    norms = plain(stage).norms
    assert sum(norm > recipe.clip for norm in norms) >= 2
    assert sum(norm < recipe.clip for norm in norms) >= 2
    assert sum(norm < 2 * recipe.clip for norm in norms) > sum(norm < recipe.clip for norm in norms)
    for packs in packs_of(make_config(stage, one.root, one.root / "plain"), one.examples):
        supervised = {sum(sum(sample.loss_mask) for sample in pack) for pack in packs}
        assert len(supervised) > 1
