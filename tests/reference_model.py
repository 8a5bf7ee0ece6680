"""Qwen-VL in plain PyTorch: the yardstick that the distributed model is measured against.

Written from the formulas of the paper (arXiv 2308.12966, section 2.1) and the names of the published checkpoint;
it shares no code with `megatron_qwenvl/model`. The state dict carries the published tensor names, the ViT's
`in_proj` rows interleaved per head (`[heads, 3, head_dim]`) as published.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_qwenvl.config.schema import DecoderConfig, ModelConfig, VisionConfig

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ReferenceModel(nn.Module):
    """Images and tokens to logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        decoder = config.decoder
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(decoder.vocab_size, decoder.hidden)
        self.transformer.h = nn.ModuleList(DecoderLayer(decoder) for _ in range(decoder.layers))
        self.transformer.ln_f = nn.RMSNorm(decoder.hidden, eps=decoder.norm_eps)
        self.transformer.visual = VisionTower(config)
        self.lm_head = nn.Linear(decoder.hidden, decoder.vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        pixels: Tensor | None = None,
        image_starts: list[tuple[int, int]] | None = None,
        position_ids: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: int64 `[b, s]`.
            pixels: uint8 RGB `[n, 3, S, S]`, not normalised.
            image_starts: row and first slot of each image.
            position_ids: int64 `[b, s]` rotary positions; none: 0..s-1.
            segments: integers `[b, s]`; tokens see earlier tokens of their own segment. None: one segment.

        Returns:
            `[b, s, vocab]`.
        """
        b, s = tokens.shape
        x = self.transformer.wte(tokens)
        if pixels is not None and len(pixels):
            x = x.clone()
            features = self.transformer.visual(pixels)
            for (row, start), image in zip(image_starts or [], features, strict=True):
                x[row, start : start + len(image)] = image
        if position_ids is None:
            position_ids = torch.arange(s).expand(b, s)
        mask = torch.ones(s, s, dtype=torch.bool).tril().expand(b, s, s)
        if segments is not None:
            mask = mask & (segments[:, :, None] == segments[:, None, :])
        for layer in self.transformer.h:
            x = layer(x, position_ids, mask)
        return self.lm_head(self.transformer.ln_f(x))


class DecoderLayer(nn.Module):
    """Pre-norm causal attention with rotary positions, then SwiGLU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.ln_2 = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.attn = nn.Module()
        self.attn.c_attn = nn.Linear(config.hidden, 3 * config.hidden)
        self.attn.c_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.mlp = nn.Module()
        self.mlp.w1 = nn.Linear(config.hidden, config.ffn_hidden, bias=False)
        self.mlp.w2 = nn.Linear(config.hidden, config.ffn_hidden, bias=False)
        self.mlp.c_proj = nn.Linear(config.ffn_hidden, config.hidden, bias=False)
        self.heads, self.base = config.heads, config.rotary_base

    def forward(self, x: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        """`[b, s, hidden]` to the same; `mask` `[b, s, s]` is true where a query may look."""
        q, k, v = self.attn.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        q, k, v = (split_heads(y, self.heads) for y in (q, k, v))
        q, k = (rotate(y, position_ids, self.base) for y in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        x = x + self.attn.c_proj(join_heads(mixed))
        y = self.ln_2(x)
        return x + self.mlp.c_proj(self.mlp.w1(y) * F.silu(self.mlp.w2(y)))


class VisionTower(nn.Module):
    """ViT, position-aware adapter, final norm and projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision, hidden = config.vision, config.decoder.hidden
        self.conv1 = nn.Conv2d(3, vision.width, vision.patch_size, vision.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(vision.position_grid**2, vision.width))
        self.ln_pre = nn.LayerNorm(vision.width, eps=vision.norm_eps)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(VisionLayer(vision) for _ in range(vision.layers))
        self.attn_pool = Resampler(config)
        self.ln_post = nn.LayerNorm(hidden, eps=config.adapter.norm_eps)
        self.proj = nn.Parameter(torch.empty(hidden, hidden))

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 `[n, 3, S, S]` to `[n, query_grid^2, hidden]`."""
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
        x = self.conv1((pixels / 255 - mean) / std)
        grid = x.shape[-1]
        x = x.flatten(2).transpose(1, 2) + resized(self.positional_embedding, grid)
        x = self.ln_pre(x)
        for layer in self.transformer.resblocks:
            x = layer(x)
        return self.ln_post(self.attn_pool(x, grid)) @ self.proj


class VisionLayer(nn.Module):
    """Pre-norm bidirectional attention, then an MLP with exact GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.ln_2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = nn.Module()
        self.attn.in_proj = nn.Linear(config.width, 3 * config.width)
        self.attn.out_proj = nn.Linear(config.width, config.width)
        self.mlp = nn.Module()
        self.mlp.c_fc = nn.Linear(config.width, config.mlp_hidden)
        self.mlp.c_proj = nn.Linear(config.mlp_hidden, config.width)
        self.heads = config.heads

    def forward(self, x: Tensor) -> Tensor:
        """`[n, patches, width]` to the same."""
        qkv = self.attn.in_proj(self.ln_1(x)).unflatten(-1, (self.heads, 3, -1))
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [n, heads, patches, head_dim]
        x = x + self.attn.out_proj(join_heads(F.scaled_dot_product_attention(q, k, v)))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class Resampler(nn.Module):
    """One cross-attention from learned queries; constant positions are added to queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, grid, eps = config.decoder.hidden, config.adapter.query_grid, config.adapter.norm_eps
        self.query = nn.Parameter(torch.empty(grid**2, hidden))
        self.register_buffer("pos_embed", sincos_positions(grid, hidden))
        self.kv_proj = nn.Linear(config.vision.width, hidden, bias=False)
        self.ln_q = nn.LayerNorm(hidden, eps=eps)
        self.ln_kv = nn.LayerNorm(hidden, eps=eps)
        self.attn = nn.MultiheadAttention(hidden, config.adapter.heads, batch_first=True)

    def forward(self, patches: Tensor, grid: int) -> Tensor:
        """`[n, grid^2, width]` to `[n, query_grid^2, hidden]`."""
        values = self.ln_kv(self.kv_proj(patches))
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(patches), -1, -1)
        return self.attn(queries, values + resized(self.pos_embed, grid), values, need_weights=False)[0]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[b, s, hidden]` to `[b, heads, s, head_dim]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """`[b, heads, s, head_dim]` to `[b, s, hidden]`."""
    return x.transpose(1, 2).flatten(2)


def rotate(x: Tensor, position_ids: Tensor, base: float) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of `[b, heads, s, d]`: channels i and i + d/2 form a pair."""
    half = x.shape[-1] // 2
    angles = position_ids[:, None, :, None] * base ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def sincos_positions(grid: int, width: int) -> Tensor:
    """`[grid^2, width]`: first half of the channels for the column, second for the row, each [sin | cos]."""
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    rates = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [axis.reshape(-1, 1) * rates for axis in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


def resized(table: Tensor, grid: int) -> Tensor:
    """A square table `[side^2, width]` at `grid` x `grid`: bicubic, float32, `align_corners=False`."""
    side = round(len(table) ** 0.5)
    if side == grid:
        return table
    image = table.float().T.reshape(1, -1, side, side)
    return F.interpolate(image, (grid, grid), mode="bicubic", align_corners=False)[0].flatten(1).T
