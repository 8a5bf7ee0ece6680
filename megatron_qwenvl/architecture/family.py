"""Interface of a decoder family: how a configuration becomes a tower, and the other differences between families."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from megatron_qwenvl.config.schema import DecoderConfig

from .tower import Tower


class DecoderFamily(Protocol):
    """One value of `model.decoder.family`. Its tensors and keys in the Hugging Face layout are in
    `checkpoint/formats/`."""

    @property
    def name(self) -> str:
        """The value."""

    @property
    def tokenizer_file(self) -> str:
        """Name of the vocabulary file in the Hugging Face layout."""

    @property
    def extends_context(self) -> bool:
        """Whether prompts beyond the trained length widen the rotary base (dynamic NTK) and scale queries (log-n);
        otherwise positions go on as they are."""

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output layer is the word embedding; none is so far (see docs/families.md)."""

    def tower(self, decoder: DecoderConfig) -> Tower:
        """Transformer layers and final norm of a decoder of this family."""

    def problems(self, decoder: DecoderConfig) -> Iterator[str]:
        """Fields that this family cannot have, one line each."""
