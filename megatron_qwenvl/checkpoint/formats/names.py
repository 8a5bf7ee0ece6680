"""Which published tensors are which of ours: one table per published layout, used in both directions.

Ours are the checkpoint keys of `model.shapes.tensor_shapes`; a rule says which of them come from which
published tensors by which mapping.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from megatron_qwenvl.architecture.tower import Shape
from megatron_qwenvl.config.schema import ModelConfig

from .mappings import InterleavedHeads, Mapping, PaddedRows, Same, Split, Stacked, Transposed, WithoutClassRow

TABLE_NAME = "transformer.visual.attn_pool.pos_embed"
"""The adapter's constant sin-cos table: published as a tensor, computed by this project."""


_SAME = Same()


@dataclass(frozen=True)
class Rule:
    """`ours` and `theirs` hold the same weights, related by `mapping`."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    mapping: Mapping = _SAME


def _rules(table: dict[str, str], ours: str, theirs: str) -> list[Rule]:
    """Rules for tensors that are stored alike; names get the prefixes `ours` and `theirs`."""
    return [Rule((ours + mine,), (theirs + other,)) for mine, other in table.items()]


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
        ours, theirs = f"decoder.layers.{i}.", f"transformer.h.{i}."
        rules += _rules(_DECODER_LAYER, ours, theirs)
        rules += [
            Rule((f"{ours}self_attention.linear_qkv.{kind}",), (f"{theirs}attn.c_attn.{kind}",), qkv)
            for kind in ("weight", "bias")
        ]
        gate_and_up = (f"{theirs}mlp.w2.weight", f"{theirs}mlp.w1.weight")  # c_proj(w1(x) * silu(w2(x)))
        rules.append(Rule((f"{ours}mlp.linear_fc1.weight",), gate_and_up, Stacked()))
    return rules


def padded_qwen_rules(model: ModelConfig) -> list[Rule]:
    """`qwen_rules` for a vocabulary with at most `model`'s rows (import only)."""
    padded = {"embedding.word_embeddings.weight", "output_layer.weight"}
    return [
        Rule(rule.ours, rule.theirs, PaddedRows(model.decoder.vocab_size)) if rule.ours[0] in padded else rule
        for rule in qwen_rules(model)
    ]


def qwenvl_rules(model: ModelConfig) -> list[Rule]:
    """The published Qwen-VL. Its ViT stores query, key and value rows interleaved per head, as we do."""
    visual = "transformer.visual."
    rules = _rules(_VIT_STEM, "patch_embed.", visual)
    for i in range(model.vision.layers):
        ours, theirs = f"vit.layers.{i}.", f"{visual}transformer.resblocks.{i}."
        rules += _rules(_VIT_LAYER, ours, theirs)
        rules += _rules({f"linear_qkv.{kind}": f"in_proj.{kind}" for kind in ("weight", "bias")},
                        ours + "self_attention.", theirs + "attn.")  # fmt: skip
    rules += _rules(_ADAPTER, "adapter.", f"{visual}attn_pool.")
    rules += [
        Rule(
            tuple(f"adapter.linear_{part}.{kind}" for part in "qkv"),
            (f"{visual}attn_pool.attn.in_proj_{kind}",),
            Split(),
        )
        for kind in ("weight", "bias")
    ]
    rules += _rules({"weight": "weight", "bias": "bias"}, "adapter.ln_post.", f"{visual}ln_post.")
    rules.append(Rule(("adapter.proj.weight",), (f"{visual}proj",), Transposed()))
    return rules + qwen_rules(model)


def open_clip_rules(model: ModelConfig) -> list[Rule]:
    """The image tower of OpenCLIP's own layout: [q; k; v] rows, a class token (dropped)."""
    rules = [
        rule if "positional" not in rule.ours[0] else Rule(rule.ours, rule.theirs, WithoutClassRow())
        for rule in _rules(_VIT_STEM, "patch_embed.", "visual.")
    ]
    qkv = InterleavedHeads(model.vision.heads)
    for i in range(model.vision.layers):
        ours, theirs = f"vit.layers.{i}.", f"visual.transformer.resblocks.{i}."
        rules += _rules(_VIT_LAYER, ours, theirs)
        rules += [
            Rule((f"{ours}self_attention.linear_qkv.{kind}",), (f"{theirs}attn.in_proj_{kind}",), qkv)
            for kind in ("weight", "bias")
        ]
    return rules


def hf_clip_rules(model: ModelConfig) -> list[Rule]:
    """The image tower of OpenCLIP in the Hugging Face layout: separate q, k and v, a class token (dropped)."""
    stem = "vision_model.embeddings."
    rules = [
        Rule(("patch_embed.conv1.weight",), (f"{stem}patch_embedding.weight",)),
        Rule(("patch_embed.positional_embedding",), (f"{stem}position_embedding.weight",), WithoutClassRow()),
        *_rules(  # the layout's own spelling
            {"weight": "weight", "bias": "bias"}, "patch_embed.ln_pre.", "vision_model.pre_layrnorm."
        ),
    ]
    qkv = InterleavedHeads(model.vision.heads, parts=3)
    for i in range(model.vision.layers):
        ours, theirs = f"vit.layers.{i}.", f"vision_model.encoder.layers.{i}."
        rules += _rules(_HF_CLIP_LAYER, ours, theirs)
        for kind in ("weight", "bias"):
            parts = tuple(f"{theirs}self_attn.{part}_proj.{kind}" for part in "qkv")
            rules.append(Rule((f"{ours}self_attention.linear_qkv.{kind}",), parts, qkv))
    return rules


_COLUMN_PARALLEL = re.compile(
    r"(linear_qkv|linear_fc1|adapter\.linear_[qkv])\.(weight|bias)$|word_embeddings\.weight$|^output_layer\.weight$"
)
_ROW_PARALLEL = re.compile(r"(linear_proj|linear_fc2)\.weight$")


def chunk_grid(name: str, shape: Shape) -> tuple[int, int]:
    """Axis and number of chunks in which a tensor is stored, so that a rank of a tensor-parallel run of up to 8
    reads little more than its own part. Any layout can read any chunking."""
    if _ROW_PARALLEL.search(name):
        return 1, math.gcd(shape[1], 8)
    if _COLUMN_PARALLEL.search(name):
        gated = name.startswith("decoder.") and "linear_fc1" in name
        return 0, math.gcd(shape[0], 16 if gated else 8)
    return 0, 1
