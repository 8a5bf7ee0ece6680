"""FLOP counts against torch's own count of a forward and backward pass through the plain PyTorch reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_qwenvl.config.schema import AdapterConfig, DecoderConfig, ModelConfig, VisionConfig
from megatron_qwenvl.model.flops import Workload, layer_flops, total_flops
from megatron_qwenvl.model.layers import list_layers
from tests.reference_model import ReferenceModel

MODEL = ModelConfig(
    vision=VisionConfig(layers=2, width=24, heads=4, mlp_hidden=56, position_grid=4, patch_size=14),
    adapter=AdapterConfig(query_grid=2, heads=4),
    decoder=DecoderConfig(layers=2, hidden=32, heads=4, ffn_hidden=80, vocab_size=208),
)
"""No two products of a layer have the same size."""
SIDE, TOKENS = 56, 40
PATCHES = (SIDE // MODEL.vision.patch_size) ** 2
ADAPTER = ("transformer.visual.attn_pool.", "transformer.visual.ln_post.", "transformer.visual.proj")
FROZEN: dict[str, tuple[Any, ...]] = {"stage1": ("decoder",), "stage2": (), "stage3": ("vit",)}


def part_of(name: str) -> str:
    if name.startswith(ADAPTER):
        return "adapter"
    return "vit" if name.startswith("transformer.visual.") else "decoder"


def counted(model: ModelConfig, frozen: tuple[Any, ...]) -> int:
    """FLOPs that torch counts over one image and TOKENS tokens with a loss at every one of them."""
    reference = ReferenceModel(model)
    for name, parameter in reference.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.requires_grad_(part_of(name) not in frozen)
    tokens = torch.randint(0, model.decoder.vocab_size, (1, TOKENS))
    pixels = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8)
    # The plain backend is made of products that the counter sees; it computes the whole square of a causal mask.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        reference(tokens, pixels, [(0, 1)]).sum().backward()
    return counter.get_total_flops()


def workload(causal_half: float = 1.0) -> Workload:
    """The same work; `causal_half` 2 makes up for what the counter cannot leave out."""
    return Workload(
        images=1, patches=PATCHES, tokens=TOKENS, attention_pairs=causal_half * TOKENS**2, loss_tokens=TOKENS
    )


def resized(part: str, layers: int) -> ModelConfig:
    section = getattr(MODEL, part).model_copy(update={"layers": layers})
    return MODEL.model_copy(update={part: section})


@pytest.mark.parametrize("stage", FROZEN)
def test_a_whole_step_is_counted_as_torch_counts_it(stage: str) -> None:
    frozen = FROZEN[stage]
    assert total_flops(MODEL, frozen, workload(2)) == counted(MODEL, frozen)


@pytest.mark.parametrize("stage", FROZEN)
@pytest.mark.parametrize(("part", "kind"), [("vision", "vit"), ("decoder", "decoder")])
def test_one_more_layer_costs_what_torch_counts_for_it(part: str, kind: str, stage: str) -> None:
    frozen = FROZEN[stage]
    index = [layer.kind for layer in list_layers(MODEL)].index(kind) + 1
    cost = layer_flops(MODEL, frozen, workload(2))[index]
    assert cost == counted(resized(part, 3), frozen) - counted(MODEL, frozen)


def test_parts_without_layers_by_hand() -> None:
    """Forward, weight gradient and input gradient of the patch embedding, the adapter and the head."""
    for stage, patch_embed, adapter_input, head in (
        ("stage1", 2, 3, 2),
        ("stage2", 2, 3, 3),
        ("stage3", 1, 2, 3),
    ):
        costs = dict(
            zip(
                (layer.kind for layer in list_layers(MODEL)),
                layer_flops(MODEL, FROZEN[stage], workload()),
                strict=True,
            )
        )
        assert costs["patch_embed"] == patch_embed * 2 * PATCHES * (3 * 14 * 14) * 24
        queries = 4
        keys_and_values = 2 * PATCHES * 2 * 32 * 32
        rest = 2 * queries * 3 * 32 * 32 + 2 * 2 * queries * PATCHES * 32
        assert costs["adapter"] == adapter_input * 2 * PATCHES * 24 * 32 + 3 * (keys_and_values + rest)
        assert costs["head"] == head * 2 * TOKENS * 32 * 208
        assert costs["embedding"] == 0


def test_causal_attention_counts_half_the_square() -> None:
    """Only the decoder's attention depends on the pairs: 2 layers, forward and both gradients, 2 products."""
    difference = total_flops(MODEL, (), workload(2)) - total_flops(MODEL, (), workload(1))
    assert difference == 2 * 3 * 2 * 2 * (TOKENS**2 / 2) * 32
