"""A byte-level BPE vocabulary from a Hugging Face `tokenizer.json`, as Qwen2.5 has it; needs the package tokenizers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.runtime.retry import retry_read

_DECIDING = ("normalizer", "pre_tokenizer", "model", "added_tokens")
"""Parts of the file that decide how text is encoded; others add tokens, cut or pad, which is not done here."""


class HFVocabulary:
    """The vocabulary of a `tokenizer.json`.

    Added tokens, control tokens or not (`<tool_call>`), are never found in text: they are taken out of the library's
    tokenizer and reached by `special_ids` alone.

    Raises:
        DataError: the package tokenizers is missing, or the file is missing or not a byte-level BPE vocabulary.
    """

    def __init__(self, path: Path) -> None:
        content = _read_json(path)
        if problem := _find_problem(content):
            raise DataError(f"{path}: {problem}")
        self.special_ids: dict[str, int] = {
            token["content"]: token["id"] for token in content["added_tokens"]
        }
        ids: dict[str, int] = content["model"]["vocab"]
        text_ids = {token: number for token, number in ids.items() if token not in self.special_ids}
        content["model"]["vocab"] = text_ids
        self.size = max(*text_ids.values(), *self.special_ids.values()) + 1
        self.digest = _digest(content)
        self._tokens = {number: _token_bytes(token) for token, number in text_ids.items()}
        self._tokens |= {number: token.encode() for token, number in self.special_ids.items()}
        self._tokenizer = _build(path, content)

    def encode(self, text: str) -> list[int]:
        """Ids of text, without any special id."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, token: int) -> bytes | None:
        """UTF-8 of a token, which may be a part of a character; None: there is no such token."""
        return self._tokens.get(token)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(retry_read(path, path.read_bytes))
    except OSError as error:
        raise DataError(f"{path}: cannot read the vocabulary: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object, found {type(content).__name__}")
    return content


def _find_problem(content: dict[str, Any]) -> str | None:
    """Reason why the content is not a byte-level BPE vocabulary with added tokens."""
    model, added = content.get("model"), content.get("added_tokens")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        return "model: expected a BPE vocabulary"
    if not isinstance(added, list) or not added or not all(_is_token(token) for token in added):
        return "added_tokens: expected a list of tokens with content and id"
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    if not all(type(number) is int and 0 <= number < 1 << 31 for number in ids.values()):
        return "model.vocab, added_tokens: expected whole numbers from 0 as ids"
    if len(set(ids.values())) < len(ids):
        return "model.vocab, added_tokens: expected an id of its own for each token"
    if any(letter not in model["vocab"] for letter in _BYTES):
        return "model.vocab: expected a token for every single byte"
    if any(not set(token) <= _BYTES.keys() for token in model["vocab"]):
        return "model.vocab: expected tokens in the letters that stand for bytes"
    last = _last_step(content.get("pre_tokenizer"))
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return "pre_tokenizer: expected ByteLevel without add_prefix_space as the last step"
    return None


def _is_token(token: object) -> bool:
    return isinstance(token, dict) and isinstance(token.get("content"), str) and "id" in token


def _last_step(step: object) -> dict[str, Any]:
    """Last step of a pre-tokenizer; empty: none that is known."""
    if isinstance(step, dict) and step.get("type") == "Sequence":
        inner = step.get("pretokenizers")
        return _last_step(inner[-1] if isinstance(inner, list) and inner else None)
    return step if isinstance(step, dict) else {}


def _build(path: Path, content: dict[str, Any]) -> Any:
    """The library's tokenizer without added tokens."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataError(
            f"{path}: a tokenizer.json needs the package tokenizers: pip install 'megatron-qwenvl[hf-tokenizer]'"
        ) from None
    plain = {**content, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        return Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path}: not a vocabulary: {error}") from None


def _digest(content: dict[str, Any]) -> str:
    """Digest of everything that decides how text is encoded."""
    deciding = {name: content.get(name) for name in _DECIDING}
    text = json.dumps(deciding, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's): the byte's own where that is a visible
    Latin-1 letter, else one of those from U+0100, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {
        chr(0x100 + i): value for i, value in enumerate(others)
    }


_BYTES = _byte_letters()


def _token_bytes(token: str) -> bytes:
    return bytes(_BYTES[letter] for letter in token)
