"""Context extension: positions beyond the trained length at inference, as the published code of Qwen-VL has it.

Two measures, neither of which acts in training, in validation, or within the trained length. They belong to the decoder
family `qwen`; `qwen2` goes on with plain rotary positions.

- *Dynamic NTK*: the base of the rotary frequencies is multiplied by alpha^(d / (d - 2)), d channels per head, with
  alpha = 2^ceil(log2(n / seq_length) + 1) - 1 for n > seq_length tokens, else 1. The published code takes n from the
  forward pass that fills an empty cache, which is the prompt's. It keeps this alpha while tokens are generated, however
  many, because the cached keys are rotated already. So alpha follows the prompt alone.
- *log-n*: the query at position i (counted from 1) beyond seq_length is multiplied by log(i) / log(seq_length), after
  its rotation, by its own position alone. Keys are left as they are.

Source: `modeling_qwen.py` of the published Qwen-VL and Qwen-VL-Chat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from megatron_qwenvl.architecture.model import family_of
from megatron_qwenvl.config.schema import DecoderConfig


@dataclass(frozen=True)
class LongContext:
    """Settings of the context extension. The defaults are the published ones."""

    seq_length: int = 2048
    """Trained length in tokens."""
    dynamic_ntk: bool = True
    """Widen the rotary base for longer prompts."""
    logn: bool = True
    """Scale queries at later positions."""

    def extension_for(self, prompt_length: int) -> ContextExtension:
        """The extension for a prompt of so many tokens, image slots included, and for all tokens generated after it."""
        alpha = ntk_alpha(prompt_length, self.seq_length) if self.dynamic_ntk else 1
        return ContextExtension(alpha, self.seq_length if self.logn else None)


@dataclass(frozen=True)
class ContextExtension:
    """The extension of one prompt; the same from its first token to the last one of its answer."""

    alpha: int
    """Factor of the dynamic NTK; 1: none."""
    logn_from: int | None
    """Length beyond which queries are scaled; none: nowhere."""

    def rotary_base(self, base: float, head_dim: int) -> float:
        """The widened base of the rotary frequencies."""
        return base * self.alpha ** (head_dim / (head_dim - 2)) if self.alpha > 1 else base

    def query_scale(self, positions: Tensor) -> Tensor | None:
        """Factors of the queries at `positions`, counted from 0: float32 of the same shape; none: all are 1."""
        if self.logn_from is None or not positions.numel() or int(positions.max()) < self.logn_from:
            return None
        logarithms = (positions + 1).double().log() / math.log(self.logn_from)
        return logarithms.clamp(min=1.0).float()


def long_context(decoder: DecoderConfig, settings: LongContext | None = None) -> LongContext:
    """The extension that a decoder has: `settings` (by default the published ones) if its family has any."""
    settings = settings or LongContext()
    if family_of(decoder).extends_context:
        return settings
    return LongContext(settings.seq_length, dynamic_ntk=False, logn=False)


def ntk_alpha(length: int, seq_length: int) -> int:
    """The dynamic NTK's alpha: 1 up to `seq_length` tokens, 3 up to twice as many, then 7, 15, ..."""
    if length <= seq_length:
        return 1
    alpha: int = 2 ** math.ceil(math.log(length / seq_length, 2) + 1) - 1
    return alpha


@dataclass
class Segments(PackedSeqParams):
    """megatron-core's description of a packed sequence, and the factors of its queries."""

    query_scale: Tensor | None = None
    """float32 `[T]`; none: all are 1."""


def scale_queries(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Scale the queries before a core attention of any layer backend (a forward pre-hook).

    Args:
        attention: the module that is called.
        args: query `[T, 1, heads, head_dim]` or `[T, heads, head_dim]`, rotated; then the other arguments.
        kwargs: `packed_seq_params` may be `Segments`.
    """
    scale = getattr(kwargs.get("packed_seq_params"), "query_scale", None)
    if scale is None:
        return None
    query = args[0]
    scale = scale.to(query.dtype).view(-1, *(1 for _ in query.shape[1:]))
    return (query * scale, *args[1:]), kwargs
