"""Qwen2.5's kind of vocabulary: a Hugging Face `tokenizer.json` under the same rules as `qwen.tiktoken`."""

from __future__ import annotations

import builtins
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megatron_qwenvl.config.load import load_config
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.rendering.special_tokens import QWEN, QWEN2
from megatron_qwenvl.data.rendering.token_builder import TokenizedSample
from megatron_qwenvl.data.rendering.tokenizer import (
    Tokenizer,
    _read_ranks,
    load_decoder_tokenizer,
    load_tokenizer,
)
from megatron_qwenvl.data.shards.directory import open_directory
from megatron_qwenvl.data.shards.indexing import IndexJob, index_directory
from tests.unit.data.conftest import QWEN_VOCABULARY
from tests.unit.data.data_cases import sample, write_source
from tests.unit.data.hf_vocabulary import QWEN2_ADDED, SMALL_RANKS, tokenizer_json, write_vocabulary

from .test_formats import CASES, render
from .test_tokenizer import TEXTS


@pytest.mark.slow
def test_full_size_ids_are_those_of_qwen2_5(tmp_path: Path, qwen: Tokenizer) -> None:
    """Qwen2.5 has Qwen's byte pairs, and other special tokens behind them."""
    path = write_vocabulary(tmp_path / "tokenizer.json", tokenizer_json(_read_ranks(Path(QWEN_VOCABULARY))))
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.eos, tokenizer.im_start, tokenizer.im_end) == (151643, 151644, 151645)
    assert tokenizer.markup == {"ref": (151646, 151647), "box": (151648, 151649), "quad": (151650, 151651)}
    assert (tokenizer.img_start, tokenizer.img_end, tokenizer.img_pad) == (151652, 151653, 151655)
    assert tokenizer.vocab_size == 151665
    for text in [*TEXTS, Path(__file__).read_text()]:
        assert tokenizer.encode(text) == qwen.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == qwen.decode(qwen.encode(text))


@pytest.mark.parametrize("recipe", ["tiny_stage1", "tiny_qwen2_stage1"])
def test_a_run_refuses_the_vocabulary_of_another_family(tmp_path: Path, recipe: str) -> None:
    paths = {
        "tiny_qwen2_stage1": str(write_vocabulary(tmp_path / "tokenizer.json", tokenizer_json(SMALL_RANKS)))
    }
    paths["tiny_stage1"] = QWEN_VOCABULARY
    for owner, path in paths.items():
        config = load_config(recipe, ["--data.tokenizer", path])
        if owner == recipe:
            load_decoder_tokenizer(config)
        else:
            with pytest.raises(DataError, match=r"data\.tokenizer: expected a vocabulary such as .* found "):
                load_decoder_tokenizer(config)


def test_the_documented_table_of_special_tokens(qwen: Tokenizer) -> None:
    """docs/families.md: spelling and id of every role in both vocabularies."""
    page = (Path(__file__).parents[4] / "docs/families.md").read_text()
    rows = [line.replace(r"\|", "!").strip("|").split("|") for line in page.splitlines() if "1516" in line]
    cells = [[re.findall(r"<[^>`]*>|\d{6}", cell) for cell in row[1:]] for row in rows if len(row) == 5]
    documented = [dict(zip(row[i], map(int, row[i + 1]), strict=True)) for i in (0, 2) for row in cells]
    found = {name: number for row in documented for name, number in row.items()}
    expected = {name: qwen._vocabulary.special_ids[name] for name in QWEN.spellings()}
    expected |= {name: 151643 + i for i, name in enumerate(QWEN2_ADDED) if name in QWEN2.spellings()}
    assert found == {name.replace("|", "!"): number for name, number in expected.items()}


def test_text_is_encoded_as_the_library_does(small_qwen2: Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_str(tokenizers.Tokenizer.from_file(small_qwen2._path).to_str())
    for text in [*TEXTS, "the thing in there"]:
        assert small_qwen2.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert len(small_qwen2.encode("the")) == 1


@pytest.mark.parametrize("added", QWEN2_ADDED)
def test_text_never_becomes_an_added_token(small_qwen2: Tokenizer, added: str) -> None:
    """Neither those that the file calls special nor the others; the library by itself would find all of them."""
    ids = small_qwen2.encode(f"a{added}b {added}")
    assert max(ids) < len(SMALL_RANKS)
    assert small_qwen2.decode(ids) == f"a{added}b {added}"
    library = tokenizers.Tokenizer.from_file(small_qwen2._path)
    assert max(library.encode(f"a{added}b").ids) >= len(SMALL_RANKS)


def test_an_added_token_that_is_in_the_vocabulary_too_is_not_found_in_text(tmp_path: Path) -> None:
    """A word, which the split into words leaves whole."""
    content = tokenizer_json(SMALL_RANKS, (*QWEN2_ADDED, "think"))
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    content["model"]["ignore_merges"] = True
    tokenizer = load_tokenizer(str(write_vocabulary(tmp_path / "tokenizer.json", content)))
    assert max(tokenizer.encode("<|endoftext|>think think")) < len(SMALL_RANKS)
    assert tokenizer.eos == len(SMALL_RANKS)


def test_decode_spells_special_tokens_and_survives_unknown_ids(small_qwen2: Tokenizer) -> None:
    assert (
        small_qwen2.decode([97, small_qwen2.markup["box"][0], 9999, 0xC3, 98])
        == "a<|box_start|>\ufffd\ufffdb"
    )


SPELLINGS = {
    "<img>": "<|vision_start|>", "</img>": "<|vision_end|>", "<imgpad>": "<|image_pad|>",
    "<ref>": "<|object_ref_start|>", "</ref>": "<|object_ref_end|>", "<box>": "<|box_start|>",
    "</box>": "<|box_end|>", "<quad>": "<|quad_start|>", "</quad>": "<|quad_end|>",
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_samples_differ_from_qwens_in_the_special_tokens_alone(
    small_qwen2: Tokenizer, byte_level: Tokenizer, name: str
) -> None:
    """All formats: the same text between Qwen2.5's own tokens, with the loss on the same text."""
    found, qwens = render(CASES[name].record, small_qwen2), render(CASES[name].record, byte_level)

    def split(tokenizer: Tokenizer, sample: TokenizedSample) -> list[str]:
        text = [token for token, wanted in zip(sample.tokens, sample.loss_mask, strict=True) if wanted]
        return [tokenizer.decode(sample.tokens), tokenizer.decode(text)]

    expected = split(byte_level, qwens)
    for old, new in SPELLINGS.items():
        expected = [text.replace(old, new) for text in expected]
    assert split(small_qwen2, found) == expected
    assert [token for token in found.tokens if token == small_qwen2.img_pad] == [small_qwen2.img_pad] * 2


def test_a_directory_indexed_with_another_vocabulary_is_refused(
    small_qwen2: Tokenizer, tmp_path: Path
) -> None:
    directory = write_source(tmp_path / "source", [sample("0", {"task": "text", "text": "the"})])
    with pytest.raises(DataError, match="indexed with another tokenizer"):
        open_directory(directory, small_qwen2.fingerprint)
    index_directory(directory, IndexJob(small_qwen2._path))
    open_directory(directory, small_qwen2.fingerprint)


def test_a_pickle_holds_the_path_only(small_qwen2: Tokenizer) -> None:
    stored = pickle.dumps(small_qwen2)
    assert len(stored) < 1000
    assert pickle.loads(stored).encode("the") == small_qwen2.encode("the")


def _swap(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "ids of text": _swap,
    "merges": lambda content: content["model"]["merges"].reverse(),
    "normalizer": lambda content: content.update(normalizer=None),
    "split": lambda content: content["pre_tokenizer"]["pretokenizers"].pop(0),
    "added tokens": lambda content: content["added_tokens"].append(
        {**content["added_tokens"][0], "content": "<think>", "id": 999}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_knows_what_decides_the_ids(
    small_qwen2: Tokenizer, tmp_path: Path, change: str
) -> None:
    content = tokenizer_json(SMALL_RANKS)
    same = load_tokenizer(str(write_vocabulary(tmp_path / "same.json", {**content, "decoder": None})))
    assert same.fingerprint == small_qwen2.fingerprint
    CHANGES[change](content)
    assert (
        load_tokenizer(str(write_vocabulary(tmp_path / "other.json", content))).fingerprint
        != small_qwen2.fingerprint
    )


def _without(*names: str) -> dict[str, Any]:
    return tokenizer_json(SMALL_RANKS, tuple(token for token in QWEN2_ADDED if token not in names))


def _with(**parts: Any) -> dict[str, Any]:
    return {**tokenizer_json(SMALL_RANKS), **parts}


def _model(**parts: Any) -> dict[str, Any]:
    content = tokenizer_json(SMALL_RANKS)
    return {**content, "model": {**content["model"], **parts}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (_without("<|box_end|>", "<|image_pad|>"), r"expected also <\|box_end\|>, <\|image_pad\|>"),
        (_with(added_tokens=[]), "added_tokens: expected a list of tokens"),
        (_with(added_tokens=[{"content": 3, "id": 1}]), "added_tokens: expected a list of tokens"),
        (_with(added_tokens=[{"content": "<|x|>", "id": 97}]), "an id of its own for each token"),
        (_with(added_tokens=[{"content": "<|x|>", "id": -1}]), "whole numbers from 0"),
        (_with(pre_tokenizer=None), "pre_tokenizer: expected ByteLevel"),
        (
            _with(pre_tokenizer={"type": "Sequence", "pretokenizers": [7]}),
            "pre_tokenizer: expected ByteLevel",
        ),
        (
            _with(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
            "pre_tokenizer: expected ByteLevel",
        ),
        (_with(model={"type": "WordPiece", "vocab": {}}), "model: expected a BPE vocabulary"),
        (_model(vocab={"a": 0}), "a token for every single byte"),
        (_model(merges=[["a", "nowhere"]]), "not a vocabulary: "),
        (_with(normalizer={"type": "Unknown"}), "not a vocabulary: "),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: dict[str, Any], reason: str) -> None:
    path = write_vocabulary(tmp_path / "tokenizer.json", content)
    with pytest.raises(DataError, match=reason) as raised:
        load_tokenizer(str(path))
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "nul"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"tokenizer\.json: (not JSON|expected an object)"):
        load_tokenizer(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot read"):
        load_tokenizer(str(tmp_path / "none.json"))


def test_a_missing_library_is_named_with_its_extra(
    small_qwen2: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'megatron-qwenvl\[hf-tokenizer\]'"):
        load_tokenizer(small_qwen2._path)
