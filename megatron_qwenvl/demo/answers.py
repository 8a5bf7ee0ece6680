"""A model's greedy answers to questions with images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.images import image_size, load_pixels
from megatron_qwenvl.data.rendering.renderer import Renderer
from megatron_qwenvl.data.rendering.token_builder import ImageInfo
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer
from megatron_qwenvl.inference.generate import Generator, Prompt

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
            prompts = [self._prompt(question) for question in questions[first : first + TOGETHER]]
            for ids in self._generator.generate(prompts, self._max_new_tokens):
                found.append(self._tokenizer.decode(ids).strip())
        return found

    def _prompt(self, question: Question) -> Prompt:
        data, slots = self._config.data, self._config.model.image_tokens
        images = [ImageInfo(name, *image_size(image)) for name, image in question.images]
        rendered = Renderer(self._tokenizer, slots).render(question.record, images, answer=False)
        pixels = [load_pixels(p, data.image_size, data.max_image_pixels) for _, p in question.images]
        shown = (
            np.stack([pixels[i] for i in rendered.image_order])
            if pixels
            else np.empty((0, 3, 1, 1), np.uint8)
        )
        return Prompt(rendered.tokens, rendered.image_starts, torch.from_numpy(shown))
