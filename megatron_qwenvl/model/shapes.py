"""Shapes of every tensor of the model under its checkpoint key, and what follows from them: parameter counts."""

from __future__ import annotations

from math import prod

from megatron_qwenvl.config.schema import ModelConfig, RunConfig

from .layers import is_frozen, layer_of

Shape = tuple[int, ...]


def tensor_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Full (unsharded) shape of every tensor by checkpoint key, from the configuration alone."""
    v, d = model.vision, model.decoder
    shapes: dict[str, Shape] = {
        "patch_embed.conv1.weight": (v.width, 3, v.patch_size, v.patch_size),
        "patch_embed.positional_embedding": (v.position_grid**2, v.width),
        "patch_embed.ln_pre.weight": (v.width,),
        "patch_embed.ln_pre.bias": (v.width,),
    }
    for i in range(v.layers):
        shapes |= _layer_shapes(f"vit.layers.{i}", v.width, v.mlp_hidden, gated=False, biased=True)
    shapes |= _adapter_shapes(model)
    shapes["embedding.word_embeddings.weight"] = (d.vocab_size, d.hidden)
    for i in range(d.layers):
        shapes |= _layer_shapes(f"decoder.layers.{i}", d.hidden, d.ffn_hidden, gated=True, biased=False)
    shapes["decoder.final_layernorm.weight"] = (d.hidden,)
    shapes["output_layer.weight"] = (d.vocab_size, d.hidden)
    return shapes


def _adapter_shapes(model: ModelConfig) -> dict[str, Shape]:
    hidden = model.decoder.hidden
    shapes: dict[str, Shape] = {
        "adapter.query": (model.image_tokens, hidden),
        "adapter.kv_proj.weight": (hidden, model.vision.width),
        "adapter.proj.weight": (hidden, hidden),
    }
    for norm in ("ln_q", "ln_kv", "ln_post"):
        shapes[f"adapter.{norm}.weight"] = shapes[f"adapter.{norm}.bias"] = (hidden,)
    for linear in ("linear_q", "linear_k", "linear_v", "linear_proj"):
        shapes[f"adapter.{linear}.weight"] = (hidden, hidden)
        shapes[f"adapter.{linear}.bias"] = (hidden,)
    return shapes


def _layer_shapes(prefix: str, hidden: int, ffn: int, gated: bool, biased: bool) -> dict[str, Shape]:
    """One transformer layer; `biased`: norms and all linear layers have biases, otherwise QKV alone."""
    rows = 2 * ffn if gated else ffn
    shapes: dict[str, Shape] = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (3 * hidden, hidden),
        "self_attention.linear_qkv.bias": (3 * hidden,),
        "self_attention.linear_proj.weight": (hidden, hidden),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (rows, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    if biased:
        shapes |= {
            "self_attention.linear_qkv.layer_norm_bias": (hidden,),
            "self_attention.linear_proj.bias": (hidden,),
            "mlp.linear_fc1.layer_norm_bias": (hidden,),
            "mlp.linear_fc1.bias": (rows,),
            "mlp.linear_fc2.bias": (hidden,),
        }
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def count_parameters(config: RunConfig) -> dict[str, tuple[int, int]]:
    """Elements and trained elements by part ("vit", "adapter", "decoder").

    The adapter's constant sin-cos table is not a parameter and not counted.
    """
    counts = {"vit": (0, 0), "adapter": (0, 0), "decoder": (0, 0)}
    for key, shape in tensor_shapes(config.model).items():
        total, trained = counts[layer_of(key).part]
        own = 0 if is_frozen(key, config.train.frozen) else prod(shape)
        counts[layer_of(key).part] = (total + prod(shape), trained + own)
    return counts


def describe_parameters(config: RunConfig) -> str:
    """One line: elements per part and how many are trained."""
    counts = count_parameters(config)

    def state(total: int, trained: int) -> str:
        if trained == 0:
            return "frozen"
        return "trained" if trained == total else f"{trained:,} trained"

    parts = ", ".join(
        f"{part} {total:,} ({state(total, trained)})" for part, (total, trained) in counts.items()
    )
    total, trained = (sum(count[i] for count in counts.values()) for i in (0, 1))
    return f"parameters: {total:,} in all, {trained:,} trained: {parts}"
