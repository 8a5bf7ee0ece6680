"""Greedy generation as the published Qwen-VL does it, in plain PyTorch: the prompt in one pass, then token by token.

Written from what the published `modeling_qwen.py` computes, on the weights of `ReferenceModel`; it shares no code with
`megatron_qwenvl`. What is cached are values and rotated keys. The rotary base is chosen when the cache is empty and
stays until the answer is complete; every query is scaled by its own absolute position.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference_model import DecoderLayer, ReferenceModel, join_heads, rotate, split_heads


class PublishedGeneration:
    """One conversation with a cache.

    Args:
        model: gives the weights.
        seq_length: length that the decoder was trained at.
        use_dynamic_ntk, use_logn_attn: the published switches.
    """

    def __init__(
        self,
        model: ReferenceModel,
        seq_length: int = 2048,
        use_dynamic_ntk: bool = True,
        use_logn_attn: bool = True,
    ) -> None:
        self.model, self.seq_length = model, seq_length
        self.use_dynamic_ntk, self.use_logn_attn = use_dynamic_ntk, use_logn_attn
        self.cache: list[tuple[Tensor, Tensor]] = []
        self.alpha = 1.0

    @torch.no_grad()
    def answer(
        self,
        tokens: list[int],
        count: int,
        pixels: Tensor | None = None,
        image_starts: list[int] | None = None,
    ) -> list[int]:
        """The next `count` tokens."""
        x = self.model.transformer.wte(torch.tensor([tokens]))
        if pixels is not None and len(pixels):
            for start, image in zip(image_starts or [], self.model.transformer.visual(pixels), strict=True):
                x[0, start : start + len(image)] = image
        found: list[int] = []
        for _ in range(count):
            found.append(int(self.forward(x)[0, -1].argmax()))
            x = self.model.transformer.wte(torch.tensor([found[-1:]]))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings `[1, new, hidden]` of what comes after the cache to logits `[1, new, vocab]`."""
        if not self.cache and self.use_dynamic_ntk:
            doublings = math.ceil(math.log2(x.shape[1] / self.seq_length) + 1)
            self.alpha = max(2.0**doublings - 1, 1.0)
        first = self.cache[0][0].shape[2] if self.cache else 0
        positions = torch.arange(first, first + x.shape[1])
        past = self.cache or [None] * len(self.model.transformer.h)
        self.cache = []
        for layer, kept in zip(self.model.transformer.h, past, strict=True):
            x = self._layer(layer, x, positions, kept)
        return self.model.lm_head(self.model.transformer.ln_f(x))

    def _layer(
        self, layer: DecoderLayer, x: Tensor, positions: Tensor, kept: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        q, k, v = (split_heads(y, layer.heads) for y in layer.attn.c_attn(layer.ln_1(x)).chunk(3, dim=-1))
        width = q.shape[-1]
        base = layer.base * self.alpha ** (width / (width - 2))
        q, k = (rotate(y, positions[None], base) for y in (q, k))
        if kept is not None:
            k, v = torch.cat([kept[0], k], dim=2), torch.cat([kept[1], v], dim=2)
        self.cache.append((k, v))
        if self.use_logn_attn:
            factors = [
                math.log(i, self.seq_length) if i > self.seq_length else 1.0 for i in (positions + 1).tolist()
            ]
            q = q * torch.tensor(factors)[:, None]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=kept is None)
        x = x + layer.attn.c_proj(join_heads(mixed))
        y = layer.ln_2(x)
        return x + layer.mlp.c_proj(layer.mlp.w1(y) * F.silu(layer.mlp.w2(y)))
