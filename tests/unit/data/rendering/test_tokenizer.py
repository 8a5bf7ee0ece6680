from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from dashscope.tokenizers import get_tokenizer

from megatron_qwenvl.data.errors import DataError, SampleError
from megatron_qwenvl.data.rendering.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer
from tests.unit.data.conftest import QWEN_VOCABULARY

TEXTS = [
    "Hello  world\n\n 12345",
    "美丽的花 😀",
    "don't\tSTOP",
    " (661,612),(833,812)",
    "ａ\u0301e\u0301",
    "",
]


def test_qwen_special_ids_are_the_published_ones(qwen: Tokenizer) -> None:
    assert (qwen.eos, qwen.im_start, qwen.im_end) == (151643, 151644, 151645)
    assert qwen.markup == {"ref": (151851, 151852), "box": (151853, 151854), "quad": (151855, 151856)}
    assert (qwen.img_start, qwen.img_end, qwen.img_pad) == (151857, 151858, 151859)
    assert qwen.vocab_size == 151860


def test_byte_level_ids(byte_level: Tokenizer) -> None:
    assert byte_level.encode("aé") == [97, 0xC3, 0xA9]
    assert (byte_level.eos, byte_level.img_start, byte_level.img_pad) == (256, 470, 472)
    assert byte_level.vocab_size == 473 <= 512


@pytest.mark.parametrize("text", TEXTS)
def test_qwen_encodes_like_an_independent_implementation(qwen: Tokenizer, text: str) -> None:
    assert qwen.encode(text) == get_tokenizer("qwen-7b-chat").encode(text)


@pytest.mark.parametrize("name", ["qwen", "byte_level"])
@pytest.mark.parametrize("special", [*SPECIAL_TOKENS[:4], *SPECIAL_TOKENS[-9:]])
def test_text_never_becomes_a_special_token(request: pytest.FixtureRequest, name: str, special: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(f"a{special}b {special}")
    assert max(ids) < tokenizer.eos
    assert tokenizer.decode(ids) == f"a{special}b {special}"


def test_text_is_normalised(byte_level: Tokenizer) -> None:
    assert byte_level.encode("e\u0301") == byte_level.encode("\u00e9")


def test_endless_text_skips_the_sample(qwen: Tokenizer) -> None:
    assert len(qwen.encode(" " * 99_999 + "x")) > 700
    with pytest.raises(SampleError, match="text of 1000001 characters"):
        qwen.encode(" " * 1_000_000 + "x")


def test_decode_spells_specials_and_survives_unknown_ids(byte_level: Tokenizer) -> None:
    assert byte_level.decode([97, byte_level.eos, 511, 0xC3, 98]) == "a<|endoftext|>\ufffd\ufffdb"


def test_a_pickle_holds_the_path_only(qwen: Tokenizer) -> None:
    stored = pickle.dumps(qwen)
    assert len(stored) < 1000
    assert pickle.loads(stored).fingerprint == qwen.fingerprint


def test_fingerprints_differ(qwen: Tokenizer, byte_level: Tokenizer, tmp_path: Path) -> None:
    lines = Path(QWEN_VOCABULARY).read_bytes().splitlines()
    last, other = lines[-1].split()[0], lines[-2].split()[0]
    swapped = tmp_path / "swapped.tiktoken"
    swapped.write_bytes(b"\n".join([*lines[:-2], last + b" 151641", other + b" 151642"]))
    prints = {qwen.fingerprint, byte_level.fingerprint, load_tokenizer(str(swapped)).fingerprint}
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"YQ== 0\nnot a line of it\n", r"bad\.tiktoken:2: expected 'base64-token rank'"),
        (b"YQ== 0\n**** 1\n", r"bad\.tiktoken:2: "),
        (b"YQ== 0\nYg== 2\n", "one token for each rank"),
        (b"YQ== 0\nYQ== 1\n", "one token for each rank"),
        (b"YQ== 0\nYg== 1\n", "not every single byte"),
        (b"", "not every single byte"),
    ],
)
def test_malformed_vocabulary_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        load_tokenizer(str(path))


def test_missing_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tiktoken: cannot read"):
        load_tokenizer(str(tmp_path / "none.tiktoken"))
