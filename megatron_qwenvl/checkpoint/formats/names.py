"""Tensor names of the Hugging Face formats and of this project: one table per format, used in both directions.

The megatron names are the checkpoint keys of `model.shapes.tensor_shapes`. A rule states which of them hold the same
weights as which tensors of the Hugging Face format (`hf`, also for OpenCLIP's own), and the mapping between both.
"""

from __future__ import annotations

from megatron_qwenvl.config.schema import ModelConfig

from .hf_families import hf_decoder
from .mappings import InterleavedHeads, Split, Transposed, WithoutClassRow
from .rules import Rule, identity_rules

TABLE_NAME = "transformer.visual.attn_pool.pos_embed"
"""The adapter's constant sin-cos table: a tensor of the Hugging Face format, computed by this project."""


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


def qwenvl_rules(model: ModelConfig) -> list[Rule]:
    """The whole model: ViT and adapter as in the published Qwen-VL, and the decoder in its family's format.

    The ViT stores query, key and value rows interleaved per head, as megatron-core does.
    """
    visual = "transformer.visual."
    rules = identity_rules(_VIT_STEM, "patch_embed.", visual)
    for i in range(model.vision.layers):
        megatron, hf = f"vit.layers.{i}.", f"{visual}transformer.resblocks.{i}."
        rules += identity_rules(_VIT_LAYER, megatron, hf)
        rules += identity_rules({f"linear_qkv.{kind}": f"in_proj.{kind}" for kind in ("weight", "bias")},
                        megatron + "self_attention.", hf + "attn.")  # fmt: skip
    rules += identity_rules(_ADAPTER, "adapter.", f"{visual}attn_pool.")
    rules += [
        Rule(
            tuple(f"adapter.linear_{letter}.{kind}" for letter in "qkv"),
            (f"{visual}attn_pool.attn.in_proj_{kind}",),
            Split(),
        )
        for kind in ("weight", "bias")
    ]
    rules += identity_rules({"weight": "weight", "bias": "bias"}, "adapter.ln_post.", f"{visual}ln_post.")
    rules.append(Rule(("adapter.proj.weight",), (f"{visual}proj",), Transposed()))
    return rules + hf_decoder(model.decoder).rules(model.decoder)


def open_clip_rules(model: ModelConfig) -> list[Rule]:
    """The image tower of OpenCLIP's own format: [q; k; v] rows, a class token (dropped)."""
    rules = [
        rule if "positional" not in rule.megatron[0] else Rule(rule.megatron, rule.hf, WithoutClassRow())
        for rule in identity_rules(_VIT_STEM, "patch_embed.", "visual.")
    ]
    qkv = InterleavedHeads(model.vision.heads)
    for i in range(model.vision.layers):
        megatron, hf = f"vit.layers.{i}.", f"visual.transformer.resblocks.{i}."
        rules += identity_rules(_VIT_LAYER, megatron, hf)
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
        *identity_rules(  # the format's own spelling
            {"weight": "weight", "bias": "bias"}, "patch_embed.ln_pre.", "vision_model.pre_layrnorm."
        ),
    ]
    qkv = InterleavedHeads(model.vision.heads, hf_tensors=3)
    for i in range(model.vision.layers):
        megatron, hf = f"vit.layers.{i}.", f"vision_model.encoder.layers.{i}."
        rules += identity_rules(_HF_CLIP_LAYER, megatron, hf)
        for kind in ("weight", "bias"):
            separate = tuple(f"{hf}self_attn.{letter}_proj.{kind}" for letter in "qkv")
            rules.append(Rule((f"{megatron}self_attention.linear_qkv.{kind}",), separate, qkv))
    return rules
