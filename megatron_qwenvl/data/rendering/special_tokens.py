"""The roles of special tokens in a sample, and the tokens that have them in each vocabulary.

A further vocabulary is a further entry of `VOCABULARIES`; see docs/families.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens of one vocabulary by role, as they are spelled; a pair encloses something."""

    eos: str
    """Ends a document; also padding."""
    im_start: str
    """Starts a turn of a dialogue."""
    im_end: str
    """Ends a turn of a dialogue."""
    image: tuple[str, str]
    """Encloses an image's slots."""
    image_slot: str
    """Stands in every slot of an image."""
    ref: tuple[str, str]
    """Encloses a phrase that refers to something in an image."""
    box: tuple[str, str]
    """Encloses two corners of a box."""
    quad: tuple[str, str]
    """Encloses four corners of a quadrilateral."""

    def spellings(self) -> tuple[str, ...]:
        """All tokens."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(token for value in values for token in ((value,) if isinstance(value, str) else value))


QWEN = SpecialTokens(
    eos="<|endoftext|>",
    im_start="<|im_start|>",
    im_end="<|im_end|>",
    image=("<img>", "</img>"),
    image_slot="<imgpad>",
    ref=("<ref>", "</ref>"),
    box=("<box>", "</box>"),
    quad=("<quad>", "</quad>"),
)
"""Qwen-VL's, and those of the embedded byte-level vocabulary."""

QWEN2 = SpecialTokens(
    eos="<|endoftext|>",
    im_start="<|im_start|>",
    im_end="<|im_end|>",
    image=("<|vision_start|>", "<|vision_end|>"),
    image_slot="<|image_pad|>",
    ref=("<|object_ref_start|>", "<|object_ref_end|>"),
    box=("<|box_start|>", "<|box_end|>"),
    quad=("<|quad_start|>", "<|quad_end|>"),
)
"""Special tokens of Qwen2.5 (and of Qwen2-VL, Qwen2.5-VL and Qwen3)."""

VOCABULARIES = (QWEN2, QWEN)
"""Looked for in a `tokenizer.json` in this order; the first one that is complete there is used."""


def choose_special_tokens(ids: Mapping[str, int]) -> SpecialTokens | None:
    """The special tokens of a vocabulary with these added tokens; None: no known set is complete."""
    return next((known for known in VOCABULARIES if ids.keys() >= set(known.spellings())), None)
