"""Decoder family `qwen`: Qwen-7B, the decoder of the published Qwen-VL (arXiv 2309.16609, section 2.3)."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_qwenvl.config.schema import DecoderConfig

from .tower import Tower


class Qwen:
    """RMSNorm, SwiGLU, rotary positions over the whole head, a bias on QKV alone; every head has its own key and
    value."""

    name = "qwen"
    tokenizer_file = "qwen.tiktoken"
    extends_context = True
    tied_embeddings = False

    def tower(self, decoder: DecoderConfig) -> Tower:
        """Transformer layers and final norm."""
        return Tower(
            name="decoder",
            layers=decoder.layers,
            hidden=decoder.hidden,
            heads=decoder.heads,
            query_groups=decoder.heads,
            head_size=decoder.hidden // decoder.heads,
            ffn_hidden=decoder.ffn_hidden,
            norm="RMSNorm",
            norm_eps=decoder.norm_eps,
            activation="silu",
            gated=True,
            bias=False,
            qkv_bias=True,
            causal=True,
            rotary_base=decoder.rotary_base,
            final_norm=True,
        )

    def problems(self, decoder: DecoderConfig) -> Iterator[str]:
        """Grouped-query attention is not of this family."""
        if decoder.query_groups not in (None, decoder.heads):
            yield (
                f"model.decoder.query_groups: expected none or model.decoder.heads ({decoder.heads}) with "
                f"model.decoder.family qwen, found {decoder.query_groups}"
            )
