from __future__ import annotations

import itertools
import random

import pytest

from megatron_qwenvl.config.recipes import stage1, stage2, stage3
from megatron_qwenvl.model.flops import Workload, expected_workload, forward_flops, layer_flops
from megatron_qwenvl.model.layers import Layer, is_frozen, layer_of, list_layers, vit_depth_from_adapter
from megatron_qwenvl.model.partition import balance, make_partition
from megatron_qwenvl.model.shapes import count_parameters, tensor_shapes


def brute_force(costs: list[float], stages: int) -> float:
    bounds = itertools.combinations(range(1, len(costs)), stages - 1)
    return min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cut, len(costs)))) for cut in bounds)


def test_balance_is_exact() -> None:
    rng = random.Random(0)
    for _ in range(200):
        costs = [rng.choice([0.0, 1.0, rng.random() * 10]) for _ in range(rng.randint(2, 9))]
        stages = rng.randint(1, len(costs))
        starts = balance(costs, stages)
        assert starts[0] == 0 and list(starts) == sorted(set(starts)) and len(starts) == stages
        slowest = max(sum(costs[a:b]) for a, b in itertools.pairwise((*starts, len(costs))))
        assert slowest == pytest.approx(brute_force(costs, stages))


def test_more_stages_than_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 2 pipeline stages"):
        balance([1.0, 1.0], 3)


def test_every_tensor_has_its_layer() -> None:
    model = stage1().model
    layers = list_layers(model)
    assert len(layers) == 48 + 32 + 4
    assert {layer_of(key) for key in tensor_shapes(model)} == set(layers)
    assert layer_of("decoder.layers.12.mlp.linear_fc1.weight") == Layer("decoder", 12)
    assert layer_of("decoder.final_layernorm.weight") == Layer("head")
    with pytest.raises(KeyError, match="optimizer"):
        layer_of("optimizer.state.exp_avg")


def test_depth_counts_down_from_the_adapter_over_the_whole_tower() -> None:
    model = stage1().model
    assert vit_depth_from_adapter(Layer("vit", 47), model) == 0
    assert vit_depth_from_adapter(Layer("vit", 0), model) == 47
    assert vit_depth_from_adapter(Layer("patch_embed"), model) == 48
    assert vit_depth_from_adapter(Layer("adapter"), model) is None


def test_published_sft_freezes_the_adapters_output_too() -> None:
    assert is_frozen("adapter.ln_post.weight", ("adapter_output",))
    assert is_frozen("adapter.proj.weight", ("adapter_output",))
    assert not is_frozen("adapter.linear_proj.weight", ("adapter_output",))
    assert not is_frozen("adapter.query", ("vit",))


@pytest.mark.parametrize(
    ("recipe", "trained"),
    [
        (stage1, 1_842_770_688 + 91_791_360),
        (stage2, 1_842_770_688 + 91_791_360 + 7_721_324_544),
        (stage3, 91_791_360 + 7_721_324_544),
    ],
)
def test_trained_parameters_of_each_stage(recipe: object, trained: int) -> None:
    counts = count_parameters(recipe())  # type: ignore[operator]
    assert sum(count[1] for count in counts.values()) == trained


def test_forward_flops_of_the_decoder_by_hand() -> None:
    """2 FLOPs per weight and token, plus causal attention: 2 products of half the square."""
    model = stage2().model
    work = Workload(images=0, patches=1024, tokens=2048, attention_pairs=2048**2, loss_tokens=0)
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    attention = 2 * 2 * (2048**2 / 2) * 4096
    assert forward_flops(Layer("decoder"), model, work) == 2 * 2048 * weights + attention


def test_frozen_parts_cost_what_they_must() -> None:
    """Stage 1: the decoder has input gradients only, but all of attention's. Stage 3: the ViT has no backward pass."""
    for recipe, kind, factor in ((stage1, "decoder", 2), (stage3, "vit", 1), (stage2, "decoder", 3)):
        config = recipe()
        work = expected_workload(config.model, config.data)
        layers = list_layers(config.model)
        index = next(i for i, layer in enumerate(layers) if layer.kind == kind)
        costs = layer_flops(config.model, config.train.frozen, work)
        attention = 2 * work.attention_pairs * config.model.decoder.hidden if recipe is stage1 else 0
        assert costs[index] == factor * forward_flops(layers[index], config.model, work) + attention


@pytest.mark.parametrize("recipe", [stage1, stage2, stage3])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_full_size_partition_is_balanced(recipe: object, stages: int) -> None:
    """No stage is more than one layer above the mean."""
    config = recipe()  # type: ignore[operator]
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"pipeline": stages})})
    partition = make_partition(config, data_parallel=1)
    costs = layer_flops(config.model, config.train.frozen, expected_workload(config.model, config.data))
    assert max(partition.costs) <= sum(costs) / stages + max(costs)
    assert "pipeline stage 0: patch_embed" in partition.describe()


def test_a_given_layout_is_taken() -> None:
    config = stage2()
    parallel = config.parallel.model_copy(update={"pipeline": 3, "layout": (10, 49)})
    partition = make_partition(config.model_copy(update={"parallel": parallel}), 1)
    assert [layer.name for layer in partition.stage(1)[:1]] == ["vit.9"]
    assert partition.stage(2)[0].name == "adapter"
