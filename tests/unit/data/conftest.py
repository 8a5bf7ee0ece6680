"""Tokenizers shared by the data tests."""

from __future__ import annotations

from pathlib import Path

import dashscope
import pytest

from megatron_qwenvl.data.rendering.tokenizer import Tokenizer, load_tokenizer

QWEN_VOCABULARY = str(Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken")


@pytest.fixture(scope="session")
def qwen() -> Tokenizer:
    """The real Qwen vocabulary."""
    return load_tokenizer(QWEN_VOCABULARY)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """The embedded vocabulary."""
    return load_tokenizer()
