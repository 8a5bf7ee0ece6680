"""Text to token ids and back, with the special tokens of the vocabulary.

Three kinds of vocabulary: Qwen's own, read from a `qwen.tiktoken` file (151,643 ranks, so `<|endoftext|>` is 151643);
a `tokenizer.json` such as Qwen2.5's; and a byte-level one without any merge (256 ranks), which needs no file and has
the special tokens of Qwen's.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import tiktoken

from megatron_qwenvl.architecture.model import family_of
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError, SampleError
from megatron_qwenvl.runtime.retry import retry_read

from .hf_tokenizer import HFVocabulary
from .special_tokens import QWEN, QWEN2, SpecialTokens, choose_special_tokens

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


class Vocabulary(Protocol):
    """Ids of text and of special tokens."""

    size: int
    """One more than the largest id."""
    special_ids: dict[str, int]
    """Id of every special token by its spelling."""
    digest: str
    """Digest of everything that decides how text is encoded."""

    def encode(self, text: str) -> list[int]:
        """Ids of text, without any special id."""

    def token_bytes(self, token: int) -> bytes | None:
        """UTF-8 of a token, which may be a part of a character; None: there is no such token."""


class TiktokenVocabulary:
    """Byte-pair ranks, followed by Qwen's special tokens."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self.special_ids = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.size = len(ranks) + len(SPECIAL_TOKENS)
        self.digest = _digest(ranks)
        self._encoding = tiktoken.Encoding(
            "qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=self.special_ids
        )

    def encode(self, text: str) -> list[int]:
        """Ids of text, without any special id."""
        return list(self._encoding.encode_ordinary(text))

    def token_bytes(self, token: int) -> bytes | None:
        """UTF-8 of a token; None: there is no such token."""
        return self._encoding.decode_single_token_bytes(token) if 0 <= token < self.size else None


class Tokenizer:
    """A vocabulary in which text never becomes a special token.

    Special ids are reached by their role only: `eos`, `im_start`, `im_end`, `img_start`, `img_end`, `img_pad`, and the
    pairs `markup["ref"]`, `markup["box"]`, `markup["quad"]`.

    Args:
        vocabulary: ids of text and of special tokens.
        special: which of these have which role; all of them are in the vocabulary.
        path: the vocabulary's file; None: the byte-level one.
    """

    def __init__(self, vocabulary: Vocabulary, special: SpecialTokens, path: str | None) -> None:
        ids = vocabulary.special_ids
        self._path = path
        self._vocabulary = vocabulary
        self.special = special
        self.vocab_size = vocabulary.size
        self.fingerprint = vocabulary.digest
        self.eos = ids[special.eos]
        self.im_start, self.im_end = ids[special.im_start], ids[special.im_end]
        self.img_start, self.img_end = (ids[token] for token in special.image)
        self.img_pad = ids[special.image_slot]
        pairs = {"ref": special.ref, "box": special.box, "quad": special.quad}
        self.markup = {name: (ids[start], ids[end]) for name, (start, end) in pairs.items()}

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
        return self._vocabulary.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`: special tokens spelled out, unknown ids and broken UTF-8 as U+FFFD."""
        known = (self._vocabulary.token_bytes(token) for token in ids)
        text = b"".join(b"\xff" if token is None else token for token in known)
        return text.decode("utf-8", errors="replace")


def load_tokenizer(path: str | None = None) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` or a `qwen.tiktoken` file, or the byte-level one.

    Raises:
        DataError: the file is missing, is not a vocabulary or lacks special tokens.
    """
    if path is None:
        return Tokenizer(TiktokenVocabulary({bytes([value]): value for value in range(256)}), QWEN, None)
    if not path.endswith(".json"):
        return Tokenizer(TiktokenVocabulary(_read_ranks(Path(path))), QWEN, path)
    vocabulary = HFVocabulary(Path(path))
    special = choose_special_tokens(vocabulary.special_ids)
    if special is None:
        missing = sorted(set(QWEN2.spellings()) - vocabulary.special_ids.keys())
        raise DataError(f"{path}: added_tokens: expected also {', '.join(missing)}")
    return Tokenizer(vocabulary, special, path)


def load_decoder_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of a run: that of `data.tokenizer`, which belongs to the family of the decoder.

    Raises:
        DataError: the file cannot be used, or is another family's: the ids of special tokens would not match.
    """
    path, family = config.data.tokenizer, family_of(config.model.decoder)
    tokenizer = load_tokenizer(path)
    if path is not None and path.endswith(".json") != family.tokenizer_file.endswith(".json"):
        raise DataError(
            f"data.tokenizer: expected a vocabulary such as {family.tokenizer_file} with model.decoder.family "
            f"{family.name}, found {path}"
        )
    return tokenizer


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Parse lines of `base64-token rank`."""
    try:
        lines = retry_read(path, path.read_bytes).splitlines()
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
