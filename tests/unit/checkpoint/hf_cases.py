"""Published weights at small size, made by the plain reference model and written by the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_qwenvl.config.schema import AdapterConfig, DecoderConfig, ModelConfig, VisionConfig
from tests.reference_model import ReferenceModel

TINY = ModelConfig(
    vision=VisionConfig(layers=2, width=24, heads=4, mlp_hidden=40, position_grid=4),
    adapter=AdapterConfig(query_grid=2, heads=4),
    decoder=DecoderConfig(layers=2, hidden=32, heads=4, ffn_hidden=48, vocab_size=96),
)
MIDDLE = (
    ModelConfig(  # the proportions of the published model: head width 104, adapter heads of 128, 16x16 grids
        vision=VisionConfig(layers=3, width=208, heads=2, mlp_hidden=1024, position_grid=16),
        adapter=AdapterConfig(query_grid=16, heads=2),
        decoder=DecoderConfig(layers=2, hidden=256, heads=2, ffn_hidden=688, vocab_size=1504),
    )
)


def random_weights(model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Published names and random values; the constant table as it is."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: (value if name.endswith("pos_embed") else torch.randn(value.shape, generator=generator)).to(
            dtype
        )
        for name, value in ReferenceModel(model).state_dict().items()
    }


def config_json(model: ModelConfig, image_size: int) -> dict[str, object]:
    """`config.json` with the keys that describe the model."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "hidden_size": model.decoder.hidden,
        "intermediate_size": 2 * model.decoder.ffn_hidden,
        "kv_channels": model.decoder.hidden // model.decoder.heads,
        "num_attention_heads": model.decoder.heads,
        "num_hidden_layers": model.decoder.layers,
        "vocab_size": model.decoder.vocab_size,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "visual": {
            "heads": model.vision.heads,
            "image_size": image_size,
            "layers": model.vision.layers,
            "mlp_ratio": model.vision.mlp_hidden / model.vision.width + 1e-4,
            "output_dim": model.decoder.hidden,
            "patch_size": model.vision.patch_size,
            "width": model.vision.width,
            "adapter_heads": model.adapter.heads,
        },
    }


def write_hf(folder: Path, model: ModelConfig, weights: dict[str, Tensor], safetensors: bool = True) -> Path:
    """Write a published Qwen-VL directory in two shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(model, 448)))
    write_shards(folder, weights, safetensors)
    return folder


def write_shards(folder: Path, weights: dict[str, Tensor], safetensors: bool) -> None:
    """Write weights in two shards with their index."""
    names = sorted(weights)
    shards = {0: names[::2], 1: names[1::2]}
    files = {}
    for number, part in shards.items():
        tensors = {name: weights[name].contiguous() for name in part}
        if safetensors:
            file = f"model-{number + 1:05d}-of-00002.safetensors"
            save_file(tensors, folder / file)
        else:
            file = f"pytorch_model-{number + 1:05d}-of-00002.bin"
            torch.save(tensors, folder / file)
        files.update(dict.fromkeys(part, file))
    index = "model.safetensors.index.json" if safetensors else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"weight_map": files}))


def open_clip_weights(model: ModelConfig) -> dict[str, Tensor]:
    """OpenCLIP's own layout: the image tower under `visual.`, [q; k; v] rows, class token, and other parts."""
    g = torch.Generator().manual_seed(3)
    v = model.vision
    w: dict[str, Tensor] = {
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": torch.randn(10, 8, generator=g),
        "visual.class_embedding": torch.randn(v.width, generator=g),
        "visual.proj": torch.randn(v.width, 16, generator=g),
        "visual.conv1.weight": torch.randn(v.width, 3, 14, 14, generator=g),
        "visual.positional_embedding": torch.randn(v.position_grid**2 + 1, v.width, generator=g),
    }
    for norm in ("ln_pre", "ln_post"):
        w |= {f"visual.{norm}.{kind}": torch.randn(v.width, generator=g) for kind in ("weight", "bias")}
    for i in range(v.layers):
        layer = f"visual.transformer.resblocks.{i}."
        shapes = {
            "ln_1.weight": (v.width,), "ln_1.bias": (v.width,), "ln_2.weight": (v.width,), "ln_2.bias": (v.width,),
            "attn.in_proj_weight": (3 * v.width, v.width), "attn.in_proj_bias": (3 * v.width,),
            "attn.out_proj.weight": (v.width, v.width), "attn.out_proj.bias": (v.width,),
            "mlp.c_fc.weight": (v.mlp_hidden, v.width), "mlp.c_fc.bias": (v.mlp_hidden,),
            "mlp.c_proj.weight": (v.width, v.mlp_hidden), "mlp.c_proj.bias": (v.width,),
        }  # fmt: skip
        w |= {layer + name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return w


def as_hugging_face_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same image tower under the names of the Hugging Face layout."""
    found: dict[str, Tensor] = {}
    names = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.": "vision_model.pre_layrnorm.",
        "visual.ln_post.": "vision_model.post_layernorm.",
        "visual.transformer.resblocks.": "vision_model.encoder.layers.",
        "ln_1.": "layer_norm1.", "ln_2.": "layer_norm2.", "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    for name, value in weights.items():
        new = name
        for old, replacement in names.items():
            new = new.replace(old, replacement)
        if "in_proj" in name:
            kind = name.rsplit("_", 1)[1]
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                found[new.replace(f"attn.in_proj_{kind}", f"self_attn.{part}_proj.{kind}")] = (
                    rows.contiguous()
                )
        else:
            found[new] = value
    return found


def write_parts(folder: Path, model: ModelConfig, vocab: int) -> tuple[Path, Path]:
    """OpenCLIP and Qwen-7B directories; the language model has `vocab` rows."""
    vit, llm = folder / "vit", folder / "llm"
    vit.mkdir(parents=True)
    llm.mkdir()
    save_file(open_clip_weights(model), vit / "open_clip_model.safetensors")
    save_file(language_weights(model, vocab), llm / "model.safetensors")
    (llm / "config.json").write_text(json.dumps(config_json(model, 448)))
    return vit, llm


def language_weights(model: ModelConfig, vocab: int) -> dict[str, Tensor]:
    """Qwen-7B's tensors with `vocab` rows."""
    language = {
        name: value.bfloat16().contiguous()
        for name, value in random_weights(model).items()
        if not name.startswith("transformer.visual")
    }
    for name in ("transformer.wte.weight", "lm_head.weight"):
        language[name] = language[name][:vocab].clone()
    return language
