"""The yardstick itself: its decoder is transformers' Qwen2, its towers follow the published shapes and rules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_qwenvl.config.schema import AdapterConfig, DecoderConfig, ModelConfig, VisionConfig
from tests.reference_model import ReferenceModel, resized, sincos_positions

TINY = ModelConfig(
    vision=VisionConfig(layers=2, width=24, heads=3, mlp_hidden=40, position_grid=4),
    adapter=AdapterConfig(query_grid=2, heads=4),
    decoder=DecoderConfig(layers=2, hidden=32, heads=4, ffn_hidden=48, vocab_size=64),
)


def random_model(config: ModelConfig = TINY) -> ReferenceModel:
    torch.manual_seed(0)
    model = ReferenceModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model


def as_qwen2(model: ReferenceModel, config: DecoderConfig) -> Qwen2ForCausalLM:
    """transformers' Qwen2 with the decoder's weights; its `gate_proj` is Qwen's `w2`."""
    qwen2 = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=config.hidden,
            intermediate_size=config.ffn_hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": float(config.rotary_base)},
            tie_word_embeddings=False,
        )
    )
    weights = {"model.embed_tokens.weight": model.transformer.wte.weight}
    weights |= {"model.norm.weight": model.transformer.ln_f.weight, "lm_head.weight": model.lm_head.weight}
    for i, layer in enumerate(model.transformer.h):
        prefix = f"model.layers.{i}."
        for name, part in zip("qkv", layer.attn.c_attn.weight.chunk(3), strict=True):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = part
        for name, part in zip("qkv", layer.attn.c_attn.bias.chunk(3), strict=True):
            weights[f"{prefix}self_attn.{name}_proj.bias"] = part
        weights[f"{prefix}self_attn.o_proj.weight"] = layer.attn.c_proj.weight
        weights[f"{prefix}mlp.up_proj.weight"] = layer.mlp.w1.weight
        weights[f"{prefix}mlp.gate_proj.weight"] = layer.mlp.w2.weight
        weights[f"{prefix}mlp.down_proj.weight"] = layer.mlp.c_proj.weight
        weights[f"{prefix}input_layernorm.weight"] = layer.ln_1.weight
        weights[f"{prefix}post_attention_layernorm.weight"] = layer.ln_2.weight
    qwen2.load_state_dict(weights, strict=True)
    return qwen2


@torch.no_grad()
def test_decoder_equals_qwen2() -> None:
    model = random_model()
    tokens = torch.randint(64, (2, 9))
    theirs = as_qwen2(model, TINY.decoder)(input_ids=tokens).logits
    torch.testing.assert_close(model(tokens), theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_packed_segments_equal_the_samples_alone() -> None:
    model = random_model()
    a, b = torch.randint(64, (1, 5)), torch.randint(64, (1, 7))
    pixels = torch.randint(256, (2, 3, 56, 56), dtype=torch.uint8)
    packed = model(
        torch.cat([a, b], dim=1),
        pixels,
        [(0, 1), (0, 6)],
        position_ids=torch.tensor([[*range(5), *range(7)]]),
        segments=torch.tensor([[0] * 5 + [1] * 7]),
    )
    alone = torch.cat([model(a, pixels[:1], [(0, 1)]), model(b, pixels[1:], [(0, 1)])], dim=1)
    torch.testing.assert_close(packed, alone)
    assert not torch.allclose(packed[:, 5:], model(b, pixels[:1], [(0, 1)]))


@torch.no_grad()
def test_any_multiple_of_the_patch_gives_the_same_number_of_image_tokens() -> None:
    tower = random_model().transformer.visual
    for side in (28, 56, 112):
        assert tower(torch.randint(256, (1, 3, side, side), dtype=torch.uint8)).shape == (1, 4, 32)


@torch.no_grad()
def test_adapter_adds_positions_to_keys_but_not_to_values() -> None:
    pool = random_model().transformer.visual.attn_pool
    patches = torch.randn(1, 16, 24)
    shuffled = patches[:, torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    assert not torch.allclose(pool(patches, 4), pool(shuffled, 4))
    pool.attn.in_proj_weight[:32] = 0  # every query attends alike to all keys ..
    pool.attn.in_proj_bias[:32] = 0
    mean_of_values = pool(patches, 4)
    pool.pos_embed.zero_()
    torch.testing.assert_close(pool(patches, 4), mean_of_values)  # .. and the values know no positions


def test_resizing_keeps_a_constant_table_and_is_the_identity_on_the_same_grid() -> None:
    table = torch.randn(16, 8)
    assert resized(table, 4) is table
    torch.testing.assert_close(resized(torch.full((16, 8), 2.5), 8), torch.full((64, 8), 2.5))


def test_sincos_positions_encode_the_column_first() -> None:
    table = sincos_positions(3, 8)
    column, row = torch.tensor(2.0), torch.tensor(1.0)  # raster index 5 of a 3 x 3 grid
    rates = torch.tensor([1.0, 0.01])
    expected = torch.cat([f(at * rates) for at in (column, row) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(table[5], expected)


def test_vit_projection_rows_are_interleaved_per_head() -> None:
    """Exchanging two heads, as contiguous blocks of 3 x head_dim rows, leaves the layer unchanged."""
    layer = random_model().transformer.visual.transformer.resblocks[0]
    x = torch.randn(2, 5, 24)
    before = layer(x)
    with torch.no_grad():
        for tensor in (layer.attn.in_proj.weight, layer.attn.in_proj.bias):
            tensor.copy_(torch.cat([tensor[24:48], tensor[:24], tensor[48:]]))
        out = layer.attn.out_proj.weight
        out.copy_(torch.cat([out[:, 8:16], out[:, :8], out[:, 16:]], dim=1))
    torch.testing.assert_close(layer(x), before)


def test_published_model_has_the_published_number_of_elements_and_tensors() -> None:
    with torch.device("meta"):
        model = ReferenceModel(ModelConfig())
    state = model.state_dict()
    visual = {name: value.numel() for name, value in state.items() if ".visual." in name}
    adapter = sum(
        n for name, n in visual.items() if "attn_pool" in name or ".visual.proj" in name or "ln_post" in name
    )
    total = sum(value.numel() for value in state.values())
    assert (len(state), total) == (853, 9_656_935_168)
    assert (adapter, sum(visual.values()) - adapter) == (92_839_936, 1_842_770_688)
    assert total - sum(visual.values()) == 7_721_324_544


@pytest.mark.parametrize(
    "name", ["transformer.visual.attn_pool.attn.in_proj_weight", "transformer.h.1.mlp.w2.weight"]
)
def test_names_are_the_published_ones(name: str) -> None:
    assert name in ReferenceModel(TINY).state_dict()
