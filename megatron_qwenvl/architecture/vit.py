"""The ViT of Qwen-VL as a tower: the trunk of OpenCLIP's ViT-bigG/14.

Another ViT (SigLIP: tanh GELU, other positions) would be a function beside this one, chosen by a field of
`model.vision`; see docs/families.md.
"""

from __future__ import annotations

from megatron_qwenvl.config.schema import VisionConfig

from .tower import Shape, Tower


def describe_vit(vision: VisionConfig) -> Tower:
    """The transformer layers of the ViT."""
    return Tower(
        name="vit",
        layers=vision.layers,
        hidden=vision.width,
        heads=vision.heads,
        query_groups=vision.heads,
        head_size=vision.width // vision.heads,
        ffn_hidden=vision.mlp_hidden,
        norm="LayerNorm",
        norm_eps=vision.norm_eps,
        activation="gelu",
        gated=False,
        bias=True,
        qkv_bias=True,
        causal=False,
    )


def patch_embedding_shapes(vision: VisionConfig) -> dict[str, Shape]:
    """Shapes of the tensors in front of the layers: patches, positions and first norm."""
    return {
        "patch_embed.conv1.weight": (vision.width, 3, vision.patch_size, vision.patch_size),
        "patch_embed.positional_embedding": (vision.position_grid**2, vision.width),
        "patch_embed.ln_pre.weight": (vision.width,),
        "patch_embed.ln_pre.bias": (vision.width,),
    }
