"""Where greedy decoding ends, and which ids it never produces.

Rows of the output layer are exchanged, so that the model predicts the id in question where it predicted another one.
"""

from __future__ import annotations

import pytest
import torch

from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.data.tokenizer import load_tokenizer
from megatron_qwenvl.inference.generate import Generator, Prompt
from megatron_qwenvl.model.build import build_stage, initialize_weights
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.runtime import engine
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks

END_OF_TEXT, END_OF_TURN = 256, 258  # of the byte-level vocabulary, which has 473 ids
PADDING = 500  # a row of the model's 512 that is no id
NEW = 6


def answers_with_row(process: ProcessInfo, rows: list[int]) -> tuple[list[int], list[list[int]]]:
    """The answer to a prompt, and the answers after its third token's row was exchanged with each of `rows`."""
    config = RECIPES["tiny_stage2"]()
    runtime = engine.start(config, process)
    stage = build_stage(config, runtime, make_partition(config, 1))
    initialize_weights(stage, config.model, seed=0)
    generator = Generator(stage, load_tokenizer(None), torch.device("cpu"))
    prompt = Prompt(list(b"Which colour?"), [], torch.empty(0, 3, 56, 56, dtype=torch.uint8))
    (plain,) = generator.generate([prompt], NEW)
    found = []
    assert stage.output_layer is not None
    for row in rows:
        exchange = [row, plain[2]], [plain[2], row]
        stage.output_layer.weight.data[exchange[0]] = stage.output_layer.weight.data[exchange[1]]
        found += generator.generate([prompt], NEW)
        stage.output_layer.weight.data[exchange[0]] = stage.output_layer.weight.data[exchange[1]]
    return plain, found


@pytest.fixture(scope="module")
def answers() -> tuple[list[int], dict[int, list[int]]]:
    rows = [END_OF_TEXT, END_OF_TURN, PADDING]
    ((plain, found),) = run_ranks(1, answers_with_row, rows)
    return plain, dict(zip(rows, found, strict=True))


def test_the_prompt_can_show_it(answers: tuple[list[int], dict[int, list[int]]]) -> None:
    plain, _ = answers
    assert len(plain) == NEW
    assert plain[2] not in plain[:2]
    assert not {END_OF_TEXT, END_OF_TURN} & set(plain)


@pytest.mark.parametrize("stop", [END_OF_TEXT, END_OF_TURN])
def test_an_answer_ends_before_its_stop_token(
    stop: int, answers: tuple[list[int], dict[int, list[int]]]
) -> None:
    plain, found = answers
    assert found[stop] == plain[:2]


def test_padding_rows_are_never_produced(answers: tuple[list[int], dict[int, list[int]]]) -> None:
    plain, found = answers
    assert found[PADDING][:2] == plain[:2]
    assert len(found[PADDING]) == NEW
    assert all(token < 473 for token in found[PADDING])
