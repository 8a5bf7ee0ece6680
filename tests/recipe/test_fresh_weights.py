"""Fresh weights: the spread of every kind of tensor, as documented at `initialize_weights`.

That they are the same in every layout is part of `test_equals_plain_training.py`.
"""

from __future__ import annotations

import re

import pytest
import torch

from megatron_qwenvl.config.schema import AdapterConfig, DecoderConfig, ModelConfig, VisionConfig
from megatron_qwenvl.model.build import fresh_tensor
from megatron_qwenvl.model.shapes import tensor_shapes

VIT_LAYERS, DECODER_LAYERS, STD = 3, 7, 0.03
MODEL = ModelConfig(
    vision=VisionConfig(layers=VIT_LAYERS, width=64, heads=4, mlp_hidden=96, patch_size=6, position_grid=6),
    adapter=AdapterConfig(query_grid=6, heads=4),
    decoder=DecoderConfig(layers=DECODER_LAYERS, hidden=80, heads=4, ffn_hidden=112, vocab_size=256),
    init_std=STD,
)

# Kinds of weights and their standard deviation; GPT-2's rule for what is added to the residual stream, twice a layer.
SPREAD = [
    (r"patch_embed\.conv1\.weight", (3 * 6 * 6) ** -0.5),
    (r"patch_embed\.positional_embedding", 0.5),
    (
        r"vit\.layers\.\d+\.(self_attention\.linear_proj|mlp\.linear_fc2)\.weight",
        STD / (2 * VIT_LAYERS) ** 0.5,
    ),
    (r"vit\.layers\.\d+\.(self_attention\.linear_qkv|mlp\.linear_fc1)\.weight", STD),
    (r"adapter\.query", 0.02),
    (r"adapter\.(kv_proj|linear_[qkv]|linear_proj|proj)\.weight", STD),
    (r"embedding\.word_embeddings\.weight|output_layer\.weight", STD),
    (
        r"decoder\.layers\.\d+\.(self_attention\.linear_proj|mlp\.linear_fc2)\.weight",
        STD / (2 * DECODER_LAYERS) ** 0.5,
    ),
    (r"decoder\.layers\.\d+\.(self_attention\.linear_qkv|mlp\.linear_fc1)\.weight", STD),
]
NORM = re.compile(r".*(layer_norm_weight|layernorm\.weight|\.ln_\w+\.weight)")
BIAS = re.compile(r".*(bias)")


@pytest.fixture(scope="module")
def fresh() -> dict[str, torch.Tensor]:
    return {key: fresh_tensor(key, shape, MODEL, seed=1) for key, shape in tensor_shapes(MODEL).items()}


def test_every_weight_has_its_documented_spread(fresh: dict[str, torch.Tensor]) -> None:
    found = {pattern: 0 for pattern, _ in SPREAD}
    for key, tensor in fresh.items():
        if BIAS.fullmatch(key):
            assert not tensor.any(), key
        elif NORM.fullmatch(key):
            assert (tensor == 1).all(), key
        else:
            ((pattern, std),) = [rule for rule in SPREAD if re.fullmatch(rule[0], key)]
            found[pattern] += 1
            # Six standard errors; the factors between kinds are larger than the 6% that this is for 5,000 elements.
            assert float(tensor.std()) == pytest.approx(std, rel=6 / (2 * tensor.numel()) ** 0.5), key
            assert abs(float(tensor.mean())) < 6 * std / tensor.numel() ** 0.5, key
    assert all(found.values())


def spread_of(key: str) -> float | None:
    """Documented standard deviation of a weight; none for norms and biases."""
    stds = [std for pattern, std in SPREAD if re.fullmatch(pattern, key)]
    return stds[0] if stds else None


def test_weights_are_normal(fresh: dict[str, torch.Tensor]) -> None:
    """Of a normal distribution 0.27% lies beyond three standard deviations, of a uniform or truncated one nothing."""
    weights = fresh["embedding.word_embeddings.weight"]
    assert 0.001 < float((weights.abs() > 3 * STD).float().mean()) < 0.005


def test_tensors_and_seeds_draw_different_numbers(fresh: dict[str, torch.Tensor]) -> None:
    def start(key: str, seed: int) -> tuple[float, ...]:
        std = spread_of(key)
        assert std is not None
        values = fresh_tensor(key, tuple(fresh[key].shape), MODEL, seed).flatten()[:3] / std
        return tuple(round(value, 3) for value in values.tolist())

    drawn = [key for key in fresh if spread_of(key) is not None]
    starts = [start(key, seed) for key in drawn for seed in (1, 2)]
    assert len(set(starts)) == len(starts) == 2 * len(drawn)
    assert [start(key, seed) for key in drawn for seed in (1, 2)] == starts
