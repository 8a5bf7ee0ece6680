"""Pixels to ViT input: patch embedding, learned positions, first norm."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_qwenvl.config.schema import VisionConfig

from .pixels import CLIP_MEAN, CLIP_STD
from .positions import resize_grid


def normalize_pixels(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale uint8 RGB `[n, 3, S, S]` to [0, 1] and normalize by CLIP's mean and deviation, in float32."""
    mean = torch.tensor(CLIP_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, device=pixels.device).view(3, 1, 1)
    return ((pixels.float() / 255 - mean) / std).to(dtype)


class PatchEmbedding(MegatronModule):
    """Convolution over patches without bias, plus positions, then `ln_pre` (OpenCLIP trunk, no class token).

    Replicated over tensor-parallel ranks: it is 0.1% of the ViT. Under sequence parallelism its output is
    scattered along the patches.
    """

    def __init__(self, config: TransformerConfig, vision: VisionConfig) -> None:
        super().__init__(config=config)
        kwargs: Any = {"dtype": config.params_dtype}
        patch = vision.patch_size
        self.sequence_parallel = config.sequence_parallel
        self.conv1 = nn.Conv2d(3, vision.width, kernel_size=patch, stride=patch, bias=False, **kwargs)
        self.positional_embedding = nn.Parameter(torch.empty(vision.position_grid**2, vision.width, **kwargs))
        self.ln_pre = nn.LayerNorm(vision.width, eps=vision.norm_eps, **kwargs)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed images.

        Args:
            pixels: uint8 `[images, 3, S, S]`, S a multiple of the patch size.

        Returns:
            `[patches, images, width]`, patches divided by the tensor-parallel size under sequence parallelism.
        """
        x = self.conv1(normalize_pixels(pixels, self.conv1.weight.dtype))  # [images, width, grid, grid]
        grid = x.shape[-1]
        x = x.flatten(2).permute(2, 0, 1) + resize_grid(self.positional_embedding, grid)[:, None, :]
        x = self.ln_pre(x)
        own: Tensor = scatter_to_sequence_parallel_region(x) if self.sequence_parallel else x.contiguous()
        return own
