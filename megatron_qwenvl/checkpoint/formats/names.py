"""Tensor names of the Hugging Face formats and of this project: one table per format, used in both directions.

The megatron names are the checkpoint keys of `model.shapes.tensor_shapes`. A rule states which of them hold the same
weights as which tensors of the Hugging Face format (`hf`, also for OpenCLIP's own), and the mapping between both.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_qwenvl.config.schema import ModelConfig

from .mappings import (
    Identity,
    InterleavedHeads,
    Mapping,
    PaddedRows,
    Split,
    Stacked,
    Transposed,
    WithoutClassRow,
)

TABLE_NAME = "transformer.visual.attn_pool.pos_embed"
"""The adapter's constant sin-cos table: a tensor of the Hugging Face format, computed by this project."""


_IDENTITY = Identity()


@dataclass(frozen=True)
class Rule:
    """Names of tensors that hold the same weights in both formats, and the mapping between them."""

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    mapping: Mapping = _IDENTITY


def _rules(table: dict[str, str], megatron: str, hf: str) -> list[Rule]:
    """Rules for tensors that both formats store in the same way; names get the prefixes `megatron` and `hf`."""
    return [Rule((megatron + key,), (hf + hf_key,)) for key, hf_key in table.items()]


_VIT_STEM = {
    "conv1.weight": "conv1.weight",
    "positional_embedding": "positional_embedding",
    "ln_pre.weight": "ln_pre.weight",
    "ln_pre.bias": "ln_pre.bias",
}
_VIT_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "ln_1.weight",
    "self_attention.linear_qkv.layer_norm_bias": "ln_1.bias",
    "self_attention.linear_proj.weight": "attn.out_proj.weight",
    "self_attention.linear_proj.bias": "attn.out_proj.bias",
    "mlp.linear_fc1.layer_norm_weight": "ln_2.weight",
    "mlp.linear_fc1.layer_norm_bias": "ln_2.bias",
    "mlp.linear_fc1.weight": "mlp.c_fc.weight",
    "mlp.linear_fc1.bias": "mlp.c_fc.bias",
    "mlp.linear_fc2.weight": "mlp.c_proj.weight",
    "mlp.linear_fc2.bias": "mlp.c_proj.bias",
}
_HF_CLIP_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "layer_norm1.weight",
    "self_attention.linear_qkv.layer_norm_bias": "layer_norm1.bias",
    "self_attention.linear_proj.weight": "self_attn.out_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.out_proj.bias",
    "mlp.linear_fc1.layer_norm_weight": "layer_norm2.weight",
    "mlp.linear_fc1.layer_norm_bias": "layer_norm2.bias",
    "mlp.linear_fc1.weight": "mlp.fc1.weight",
    "mlp.linear_fc1.bias": "mlp.fc1.bias",
    "mlp.linear_fc2.weight": "mlp.fc2.weight",
    "mlp.linear_fc2.bias": "mlp.fc2.bias",
}
_ADAPTER = {
    "query": "query",
    "kv_proj.weight": "kv_proj.weight",
    "ln_q.weight": "ln_q.weight",
    "ln_q.bias": "ln_q.bias",
    "ln_kv.weight": "ln_kv.weight",
    "ln_kv.bias": "ln_kv.bias",
    "linear_proj.weight": "attn.out_proj.weight",
    "linear_proj.bias": "attn.out_proj.bias",
}
_DECODER_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "ln_1.weight",
    "self_attention.linear_proj.weight": "attn.c_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "ln_2.weight",
    "mlp.linear_fc2.weight": "mlp.c_proj.weight",
}
_DECODER_ENDS = {
    "embedding.word_embeddings.weight": "transformer.wte.weight",
    "decoder.final_layernorm.weight": "transformer.ln_f.weight",
    "output_layer.weight": "lm_head.weight",
}


def qwen_rules(model: ModelConfig) -> list[Rule]:
    """Qwen-7B's decoder, with its embedding and head; also the decoder of Qwen-VL."""
    rules = _rules(_DECODER_ENDS, "", "")
    qkv = InterleavedHeads(model.decoder.heads)
    for i in range(model.decoder.layers):
        megatron, hf = f"decoder.layers.{i}.", f"transformer.h.{i}."
        rules += _rules(_DECODER_LAYER, megatron, hf)
        rules += [
            Rule((f"{megatron}self_attention.linear_qkv.{kind}",), (f"{hf}attn.c_attn.{kind}",), qkv)
            for kind in ("weight", "bias")
        ]
        gate_and_up = (f"{hf}mlp.w2.weight", f"{hf}mlp.w1.weight")  # c_proj(w1(x) * silu(w2(x)))
        rules.append(Rule((f"{megatron}mlp.linear_fc1.weight",), gate_and_up, Stacked()))
    return rules


def padded_qwen_rules(model: ModelConfig) -> list[Rule]:
    """`qwen_rules` for a vocabulary with at most `model`'s rows (import only)."""
    padded = {"embedding.word_embeddings.weight", "output_layer.weight"}
    return [
        Rule(rule.megatron, rule.hf, PaddedRows(model.decoder.vocab_size))
        if rule.megatron[0] in padded
        else rule
        for rule in qwen_rules(model)
    ]


def qwenvl_rules(model: ModelConfig) -> list[Rule]:
    """The published Qwen-VL. Its ViT stores query, key and value rows interleaved per head, as megatron-core does."""
    visual = "transformer.visual."
    rules = _rules(_VIT_STEM, "patch_embed.", visual)
    for i in range(model.vision.layers):
        megatron, hf = f"vit.layers.{i}.", f"{visual}transformer.resblocks.{i}."
        rules += _rules(_VIT_LAYER, megatron, hf)
        rules += _rules({f"linear_qkv.{kind}": f"in_proj.{kind}" for kind in ("weight", "bias")},
                        megatron + "self_attention.", hf + "attn.")  # fmt: skip
    rules += _rules(_ADAPTER, "adapter.", f"{visual}attn_pool.")
    rules += [
        Rule(
            tuple(f"adapter.linear_{letter}.{kind}" for letter in "qkv"),
            (f"{visual}attn_pool.attn.in_proj_{kind}",),
            Split(),
        )
        for kind in ("weight", "bias")
    ]
    rules += _rules({"weight": "weight", "bias": "bias"}, "adapter.ln_post.", f"{visual}ln_post.")
    rules.append(Rule(("adapter.proj.weight",), (f"{visual}proj",), Transposed()))
    return rules + qwen_rules(model)


def open_clip_rules(model: ModelConfig) -> list[Rule]:
    """The image tower of OpenCLIP's own format: [q; k; v] rows, a class token (dropped)."""
    rules = [
        rule if "positional" not in rule.megatron[0] else Rule(rule.megatron, rule.hf, WithoutClassRow())
        for rule in _rules(_VIT_STEM, "patch_embed.", "visual.")
    ]
    qkv = InterleavedHeads(model.vision.heads)
    for i in range(model.vision.layers):
        megatron, hf = f"vit.layers.{i}.", f"visual.transformer.resblocks.{i}."
        rules += _rules(_VIT_LAYER, megatron, hf)
        rules += [
            Rule((f"{megatron}self_attention.linear_qkv.{kind}",), (f"{hf}attn.in_proj_{kind}",), qkv)
            for kind in ("weight", "bias")
        ]
    return rules


def hf_clip_rules(model: ModelConfig) -> list[Rule]:
    """The image tower of OpenCLIP in the Hugging Face format: separate q, k and v, a class token (dropped)."""
    stem = "vision_model.embeddings."
    rules = [
        Rule(("patch_embed.conv1.weight",), (f"{stem}patch_embedding.weight",)),
        Rule(("patch_embed.positional_embedding",), (f"{stem}position_embedding.weight",), WithoutClassRow()),
        *_rules(  # the format's own spelling
            {"weight": "weight", "bias": "bias"}, "patch_embed.ln_pre.", "vision_model.pre_layrnorm."
        ),
    ]
    qkv = InterleavedHeads(model.vision.heads, hf_tensors=3)
    for i in range(model.vision.layers):
        megatron, hf = f"vit.layers.{i}.", f"vision_model.encoder.layers.{i}."
        rules += _rules(_HF_CLIP_LAYER, megatron, hf)
        for kind in ("weight", "bias"):
            separate = tuple(f"{hf}self_attn.{letter}_proj.{kind}" for letter in "qkv")
            rules.append(Rule((f"{megatron}self_attention.linear_qkv.{kind}",), separate, qkv))
    return rules
