"""Tokenizers shared by the data tests."""

from __future__ import annotations

from pathlib import Path

import dashscope
import pytest

from megatron_qwenvl.data.rendering.tokenizer import Tokenizer, load_tokenizer

from .hf_vocabulary import write_vocabulary

QWEN_VOCABULARY = str(Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken")


@pytest.fixture(scope="session")
def small_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A small vocabulary in the format of Qwen2.5's, with its special tokens."""
    return load_tokenizer(str(write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "tokenizer.json")))


@pytest.fixture(scope="session")
def qwen() -> Tokenizer:
    """The real Qwen vocabulary."""
    return load_tokenizer(QWEN_VOCABULARY)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """The embedded vocabulary."""
    return load_tokenizer()
