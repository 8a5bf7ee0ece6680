"""Prompts beyond the trained length: the generator against the published code's cached generation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.rendering.tokenizer import load_tokenizer
from megatron_qwenvl.inference.generate import Generator, Prompt
from megatron_qwenvl.model.long_context import LongContext, long_context, ntk_alpha
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.reference_generation import PublishedGeneration

from .harness import run_ranks
from .model_cases import SMALL, SMALL_QWEN2, small_config
from .test_model_equals_reference import build_both

NEW = 12


def answers(
    process: ProcessInfo, config: RunConfig, context: LongContext, lengths: list[int]
) -> list[dict[str, Any]]:
    """Answers to prompts of the given lengths, each with an image: by ours, decoded together, by the published rules,
    and by the reference without what acts beyond the trained length."""
    stage, reference = build_both(process, config)
    for ours, theirs in zip(stage.decoder.layers, reference.transformer.h, strict=True):
        for projection in (ours.self_attention.linear_qkv.weight, theirs.attn.c_attn.weight):
            projection.data *= 3  # sharp attention, in which positions show
    tokenizer = load_tokenizer(None)
    tokenizer.vocab_size = config.model.decoder.vocab_size  # the small model has fewer ids than the tokenizer
    rng = torch.Generator().manual_seed(3)
    prompts = [
        Prompt(
            torch.randint(0, 128, (length,), generator=rng).tolist(),
            [1],
            torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8, generator=rng),
        )
        for length in lengths
    ]
    ours = Generator(stage, tokenizer, torch.device("cpu"), context).generate(prompts, NEW)

    def published(prompt: Prompt, ntk: bool, logn: bool) -> list[int]:
        generation = PublishedGeneration(reference, context.seq_length, ntk, logn)
        return generation.answer(prompt.tokens, NEW, prompt.pixels, prompt.image_starts)

    return [
        {
            "ours": answer,
            "published": published(prompt, context.dynamic_ntk, context.logn),
            "plain": published(prompt, False, False),
        }
        for prompt, answer in zip(prompts, ours, strict=True)
    ]


def test_prompts_about_the_trained_length_equal_the_published_code() -> None:
    """One that ends before 2,048 tokens and is answered across it, and two that are longer."""
    lengths = [2040, 2300, 4100]
    (found,) = run_ranks(1, answers, small_config(), LongContext(), lengths)
    for length, answer in zip(lengths, found, strict=True):
        assert answer["ours"] == answer["published"], length
    assert all(answer["published"] != answer["plain"] for answer in found[1:]), "the prompts do not show it"


SHORT = [8, 15, 16, 17, 18, 30, 32, 33, 40, 64, 65, 100]
"""About 16, 32 and 64 tokens."""


@pytest.mark.parametrize(
    "context",
    [LongContext(16), LongContext(16, dynamic_ntk=False), LongContext(16, logn=False)],
    ids=["both", "log-n", "ntk"],
)
def test_every_threshold_equals_the_published_code(context: LongContext) -> None:
    """A short trained length shows every rule more strongly: alpha is the prompt's also where the answer crosses a
    threshold, and prompts decoded together are extended each by its own length."""
    (found,) = run_ranks(1, answers, small_config(), context, SHORT)
    for length, answer in zip(SHORT, found, strict=True):
        assert answer["ours"] == answer["published"], length
    assert sum(answer["published"] != answer["plain"] for answer in found) >= 4, "the prompts do not show it"


def test_both_switches_off_change_nothing() -> None:
    off = LongContext(16, dynamic_ntk=False, logn=False)
    (found,) = run_ranks(1, answers, small_config(), off, SHORT)
    assert [answer["ours"] for answer in found] == [answer["plain"] for answer in found]


def test_alpha() -> None:
    steps = {1: 1, 2047: 1, 2048: 1, 2049: 3, 4096: 3, 4097: 7, 8192: 7, 8193: 15, 16384: 15, 32768: 31}
    assert {length: ntk_alpha(length, 2048) for length in steps} == steps


def test_query_scale_follows_the_position() -> None:
    positions = torch.tensor([0, 2047, 2048, 4095, 2**22 - 1])
    scale = LongContext().extension_for(10).query_scale(positions)
    assert scale is not None
    torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, math.log(2049, 2048), 12 / 11, 2.0]))
    assert LongContext().extension_for(10).query_scale(torch.arange(2048)) is None


def test_a_family_without_extension_goes_on_with_plain_positions() -> None:
    """Whatever the metadata of the weights say."""
    context = long_context(SMALL_QWEN2.decoder, LongContext(16))
    assert context == LongContext(16, dynamic_ntk=False, logn=False)
    assert long_context(SMALL.decoder, LongContext(16)) == LongContext(16)
