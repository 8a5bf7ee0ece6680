"""A model's greedy answers to questions with images."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer
from megatron_qwenvl.inference.generate import Generator
from megatron_qwenvl.inference.loaded_model import make_prompt

from .examination import Question

TOGETHER = 64
"""Prompts decoded together."""


class Answers:
    """Callable that answers questions in the form that the model was trained on (an `AnswerFunction`).

    Args:
        generator: the model.
        config: gives image size and slots per image.
        tokenizer: the model's vocabulary.
        max_new_tokens: longest answer.
    """

    def __init__(
        self, generator: Generator, config: RunConfig, tokenizer: Tokenizer, max_new_tokens: int = 64
    ) -> None:
        self._generator, self._config, self._tokenizer = generator, config, tokenizer
        self._max_new_tokens = max_new_tokens

    def __call__(self, questions: Sequence[Question]) -> list[str]:
        """Answers in the order of the questions, without blanks around them."""
        found: list[str] = []
        for first in range(0, len(questions), TOGETHER):
            prompts = [
                make_prompt(self._config, self._tokenizer, question.record, question.images)
                for question in questions[first : first + TOGETHER]
            ]
            found += self._generator.answer(prompts, self._max_new_tokens)
        return found
