"""Vocabularies in the format of Qwen2.5's `tokenizer.json`, made from byte-pair ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_qwenvl.data.rendering.hf_tokenizer import _BYTES
from megatron_qwenvl.data.rendering.tokenizer import PATTERN

QWEN2_ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
"""Qwen2.5's added tokens in the order of their ids, 151643 to 151664; those from `<tool_call>` on are not "special"."""

_LETTERS = {value: letter for letter, value in _BYTES.items()}


def spell(token: bytes) -> str:
    """A token in the letters that stand for bytes."""
    return "".join(_LETTERS[value] for value in token)


def merges_of(ranks: dict[bytes, int]) -> list[list[str]]:
    """The merge that makes each token of more than one byte, in the order of ranks."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([value]) for value in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            assert pairs[at] < rank, token
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append([spell(part) for part in parts])
    return merges


def tokenizer_json(ranks: dict[bytes, int], added: tuple[str, ...] = QWEN2_ADDED) -> dict[str, Any]:
    """The content of a `tokenizer.json` as Qwen2.5's is laid out."""
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(ranks) + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": token.startswith("<|") and "fim" not in token,
            }
            for i, token in enumerate(added)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {spell(token): rank for token, rank in ranks.items()},
            "merges": merges_of(ranks),
        },
    }  # fmt: skip


SMALL_RANKS = {
    **{bytes([value]): value for value in range(256)},
    **{
        token: 256 + i
        for i, token in enumerate((b"th", b" th", b"in", b"the", b" the", b"<|", b"|>", b"<|i", b"<|im"))
    },
}


def write_vocabulary(path: Path, content: dict[str, Any] | None = None) -> Path:
    """Write a `tokenizer.json`, by default a small one with Qwen2.5's added tokens behind 265 text tokens."""
    path.write_text(json.dumps(tokenizer_json(SMALL_RANKS) if content is None else content))
    return path
