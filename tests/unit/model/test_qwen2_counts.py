"""Parameters, FLOPs and bytes of Qwen-VL with Qwen2.5-7B, against numbers counted by hand."""

from __future__ import annotations

from megatron_qwenvl.architecture.model import FAMILIES, describe
from megatron_qwenvl.config.recipes import qwen2_5_7b_stage1, qwen2_5_7b_stage2, qwen2_5_7b_stage3
from megatron_qwenvl.config.schema import DecoderConfig
from megatron_qwenvl.model.flops import Workload, forward_flops, layer_flops
from megatron_qwenvl.model.layers import Layer, list_layers
from megatron_qwenvl.model.shapes import StateBytes, count_parameters, state_bytes, tensor_shapes

HIDDEN, FFN, LAYERS, VOCAB = 3584, 18944, 28, 152064
QKV_ROWS = (28 + 4 + 4) * 128
LAYER_MATRICES = QKV_ROWS * HIDDEN + HIDDEN * HIDDEN + 3 * HIDDEN * FFN
DECODER = LAYERS * (LAYER_MATRICES + QKV_ROWS + 2 * HIDDEN) + 2 * VOCAB * HIDDEN + HIDDEN
ADAPTER = 256 * HIDDEN + 1664 * HIDDEN + 5 * HIDDEN**2 + 4 * HIDDEN + 3 * 2 * HIDDEN
VIT = 1_842_770_688


def test_parameters() -> None:
    """The decoder has the 7,615,616,512 parameters of the published Qwen2.5-7B."""
    assert DECODER == 7_615_616_512
    counts = count_parameters(qwen2_5_7b_stage1())
    assert counts == {"vit": (VIT, VIT), "adapter": (ADAPTER, ADAPTER), "decoder": (DECODER, 0)}
    shapes = tensor_shapes(qwen2_5_7b_stage1().model)
    assert shapes["decoder.layers.27.self_attention.linear_qkv.weight"] == (4608, 3584)
    assert shapes["decoder.layers.27.mlp.linear_fc1.weight"] == (37888, 3584)


def test_bytes() -> None:
    """bf16 weights; for what is trained fp32 gradients, two fp32 moments and an fp32 master weight."""
    for recipe, trained in (
        (qwen2_5_7b_stage1, VIT + ADAPTER),
        (qwen2_5_7b_stage2, VIT + ADAPTER + DECODER),
        (qwen2_5_7b_stage3, ADAPTER + DECODER),
    ):
        assert state_bytes(recipe()) == StateBytes(2 * (VIT + ADAPTER + DECODER), 4 * trained, 12 * trained)


def test_flops_of_a_decoder_layer() -> None:
    """2 FLOPs per weight and token; two causal products of 28 query heads over half the square of 2048 positions."""
    model = qwen2_5_7b_stage2().model
    work = Workload(images=0, patches=1024, tokens=2048, attention_pairs=2048**2, loss_tokens=100)
    forward = 2 * 2048 * LAYER_MATRICES + 2 * 2 * (2048**2 / 2) * (28 * 128)
    assert forward_flops(Layer("decoder", 5), model, work) == forward
    assert forward_flops(Layer("head"), model, work) == 2 * 100 * HIDDEN * VOCAB
    costs = layer_flops(model, (), work)
    assert costs[[layer.kind for layer in list_layers(model)].index("decoder")] == 3 * forward


def test_tensor_parallel_sizes() -> None:
    """4 key-value groups allow 1, 2 and 4 of the sizes that divide 28 heads, 18944 and 152064."""
    assert describe(qwen2_5_7b_stage1().model).tensor_parallel_sizes() == [1, 2, 4]


def test_every_family_of_the_schema_is_described() -> None:
    values = DecoderConfig.model_fields["family"].annotation
    assert set(FAMILIES) == set(values.__args__)  # type: ignore[union-attr]
