"""Text to token ids and back, with Qwen's special tokens.

Two vocabularies share one set of special tokens: Qwen's own, read from a `qwen.tiktoken` file (151,643 ranks,
so `<|endoftext|>` is 151643), and a byte-level one without any merge (256 ranks), which needs no file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from megatron_qwenvl.data.errors import DataError, SampleError
from megatron_qwenvl.runtime.retry import reads

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
    "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>",
)  # fmt: skip

MAX_TEXT = 100_000  # many times a training sample; tiktoken dies of a stack overflow on a million blanks
MARKUP = ("ref", "box", "quad")


class Tokenizer:
    """A tiktoken encoding in which text never becomes a special token.

    Special ids are reached by name only: `eos`, `im_start`, `im_end`, `img_start`, `img_end`, `img_pad`, and
    the pairs `markup["ref"]`, `markup["box"]`, `markup["quad"]`.
    """

    def __init__(self, ranks: dict[bytes, int], path: str | None = None) -> None:
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self._path = path
        self._encoding = tiktoken.Encoding(
            "qwen" if path else "bytes", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        self.vocab_size = len(ranks) + len(specials)
        self.fingerprint = _digest(ranks)
        self.eos = specials["<|endoftext|>"]
        self.im_start, self.im_end = specials["<|im_start|>"], specials["<|im_end|>"]
        self.markup = {
            name: (specials[f"<{name}>"], specials[f"</{name}>"]) for name in ("ref", "box", "quad")
        }
        self.img_start, self.img_end = specials["<img>"], specials["</img>"]
        self.img_pad = specials["<imgpad>"]

    def __reduce__(self) -> tuple[object, tuple[str | None]]:
        return load_tokenizer, (self._path,)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` after NFC normalisation; never a special id, whatever the text spells.

        Raises:
            SampleError: the text is longer than `MAX_TEXT` characters.
        """
        text = unicodedata.normalize("NFC", text)
        if len(text) > MAX_TEXT:
            raise SampleError(f"text of {len(text)} characters, at most {MAX_TEXT} are allowed")
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`: special tokens spelled out, unknown ids and broken UTF-8 as U+FFFD."""
        known = (
            self._encoding.decode_single_token_bytes(i) if 0 <= i < self.vocab_size else b"\xff" for i in ids
        )
        return b"".join(known).decode("utf-8", errors="replace")


def load_tokenizer(path: str | None = None) -> Tokenizer:
    """The tokenizer of a `qwen.tiktoken` file, or the byte-level one.

    Raises:
        DataError: the file is missing or is not a vocabulary.
    """
    if path is None:
        return Tokenizer({bytes([value]): value for value in range(256)})
    return Tokenizer(_read_ranks(Path(path)), path)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Parse lines of `base64-token rank`."""
    try:
        lines = reads(path, path.read_bytes).splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot read the vocabulary: {error.strerror}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{path}:{number}: expected 'base64-token rank', found {line[:40]!r}") from None
    if len(ranks) != len(lines) or set(ranks.values()) != set(range(len(ranks))):
        raise DataError(f"{path}: expected one token for each rank 0..{max(len(lines) - 1, 0)}")
    if any(bytes([value]) not in ranks for value in range(256)):
        raise DataError(f"{path}: not a byte-pair vocabulary: not every single byte has a rank")
    return ranks


def _digest(ranks: dict[bytes, int]) -> str:
    """Digest of everything that decides how text is encoded."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (PATTERN, *SPECIAL_TOKENS):
        digest.update(part.encode() + b"\n")
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(len(token).to_bytes(2, "little") + token)
    return digest.hexdigest()
