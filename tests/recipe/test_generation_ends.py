"""Where greedy decoding ends, and which ids it never produces.

Rows of the output layer are exchanged, so that the model predicts the id in question where it predicted another one.
"""

from __future__ import annotations

import pytest
import torch

from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.data.rendering.tokenizer import load_tokenizer
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.inference.generate import Generator, Prompt
from megatron_qwenvl.model.build import build_stage, initialize_weights
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks

END_OF_TEXT, END_OF_TURN = 256, 258  # of the byte-level vocabulary, which has 473 ids
PADDING = 500  # a row of the model's 512 that is no id
NEW = 6
ENDS_AT = 2

Answers = tuple[list[int], list[int]]
"""Of a first prompt, whose token number `ENDS_AT` is exchanged, and of a second one."""


def prompt(text: str, seed: int) -> Prompt:
    """An image of four slots and a question."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (1, 3, 56, 56), dtype=torch.uint8, generator=generator)
    return Prompt([470, 472, 472, 472, 472, 471, *text.encode()], [1], pixels)


def answers_with_row(process: ProcessInfo, rows: list[int]) -> list[tuple[Answers, Answers]]:
    """Answers to two prompts together and to each alone: first of the model as it is, then with each row exchanged."""
    config = RECIPES["tiny_stage2"]()
    runtime = start_engine(config, process)
    stage = build_stage(config, runtime, make_partition(config, 1))
    initialize_weights(stage, config.model, seed=0)
    generator = Generator(stage, load_tokenizer(None), torch.device("cpu"))
    prompts = [prompt("Which colour?", 0), prompt("Is it red or blue?", 1)]

    def ask() -> tuple[Answers, Answers]:
        first, second = generator.generate(prompts, NEW)
        return (first, second), (
            generator.generate(prompts[:1], NEW)[0],
            generator.generate(prompts[1:], NEW)[0],
        )

    found = [ask()]
    exchanged = found[0][0][0][ENDS_AT]
    assert stage.output_layer is not None
    head = stage.output_layer.weight.data
    for row in rows:
        head[[row, exchanged]] = head[[exchanged, row]]
        found.append(ask())
        head[[row, exchanged]] = head[[exchanged, row]]
    return found


@pytest.fixture(scope="module")
def answers() -> dict[int | None, tuple[Answers, Answers]]:
    """Answers by exchanged row; None: as the model is."""
    rows = [END_OF_TEXT, END_OF_TURN, PADDING]
    (found,) = run_ranks(1, answers_with_row, rows)
    return dict(zip([None, *rows], found, strict=True))


def test_the_prompts_can_show_it(answers: dict[int | None, tuple[Answers, Answers]]) -> None:
    (first, second), _ = answers[None]
    assert len(first) == len(second) == NEW
    assert first != second
    assert first[ENDS_AT] not in [*first[:ENDS_AT], *second]
    assert not {END_OF_TEXT, END_OF_TURN} & {*first, *second}


@pytest.mark.parametrize("stop", [END_OF_TEXT, END_OF_TURN])
def test_an_answer_ends_before_its_stop_token(
    stop: int, answers: dict[int | None, tuple[Answers, Answers]]
) -> None:
    """And the other prompt, whose image is another one, goes on undisturbed."""
    (first, second), _ = answers[None]
    together, alone = answers[stop]
    assert together == alone == (first[:ENDS_AT], second)


def test_padding_rows_are_never_produced(answers: dict[int | None, tuple[Answers, Answers]]) -> None:
    (first, second), _ = answers[None]
    (changed, other), _ = answers[PADDING]
    assert changed[:ENDS_AT] == first[:ENDS_AT]
    assert len(changed) == NEW
    assert all(token < 473 for token in changed)
    assert other == second
