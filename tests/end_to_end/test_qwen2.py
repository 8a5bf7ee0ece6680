"""Qwen-VL with a decoder of Qwen2's family: Hugging Face files, training over TP 2 and PP 2, Hugging Face files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights
from megatron_qwenvl.checkpoint.convert.exports import execute_export, plan_export
from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_parts, plan_qwenvl
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.rendering.tokenizer import load_tokenizer
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.inference.generate import Generator, Prompt
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks
from tests.unit.checkpoint.qwen2_cases import write_qwen2_parts
from tests.unit.data.data_cases import sample, write_source
from tests.unit.data.hf_vocabulary import write_vocabulary

from .training_cases import records, run_config, train

MODEL = (
    "--model.decoder.family", "qwen2", "--model.decoder.hidden", "56", "--model.decoder.heads", "14",
    "--model.decoder.query_groups", "2", "--model.decoder.ffn_hidden", "72", "--model.adapter.heads", "4",
    "--model.decoder.rotary_base", "1000000", "--model.init_std", "0.02",
)  # fmt: skip
PARALLEL = ("--parallel.tensor", "2", "--parallel.pipeline", "2", "--parallel.sequence_parallel", "true")


def answer(process: ProcessInfo, checkpoint: Path, config: RunConfig, prompt: Prompt) -> list[int]:
    tokenizer = load_tokenizer(config.data.tokenizer)
    generator = Generator.load(checkpoint, config, tokenizer, start_engine(config, process))
    return generator.generate([prompt], 8)[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of texts, indexed with a vocabulary in Qwen2.5's format, which lies beside it."""
    folder = tmp_path_factory.mktemp("data")
    vocabulary = write_vocabulary(folder / "tokenizer.json")
    samples = [sample(str(i), {"task": "text", "text": f"the thing in there, {i}"}) for i in range(60)]
    write_source(folder / "mixed", samples, tokenizer=str(vocabulary))
    return folder


def test_from_hugging_face_files_through_training_to_hugging_face_files(data: Path, tmp_path: Path) -> None:
    arguments = (*MODEL, "--data.tokenizer", str(data / "tokenizer.json"))
    run = tmp_path / "run"
    alone = run_config(data, run, *arguments, "--train.steps", "3", recipe="tiny_qwen2_stage1")
    execute_import(
        plan_parts(*write_qwen2_parts(tmp_path / "hf", alone.model), alone, seed=1), tmp_path / "start"
    )
    config = run_config(
        data, run, *arguments, *PARALLEL, "--train.steps", "3", "--train.frozen", "[]", "--optimizer.lr", "1e-3",
        "--checkpoint.init_from", str(tmp_path / "start"), recipe="tiny_qwen2_stage1", world=4,
    )  # fmt: skip
    run_ranks(4, train, config)
    losses = [record["loss"] for record in records(run)]
    assert losses[-1] < losses[0]
    execute_export(plan_export(run), tmp_path / "whole")
    execute_import(plan_qwenvl(tmp_path / "whole"), tmp_path / "again")
    assert compare(open_weights(run), open_weights(tmp_path / "again"), 0.0, lambda _: None) == []
    assert compare(open_weights(run), open_weights(tmp_path / "start"), 0.0, lambda _: None) != []
    prompt = list(range(97, 117))
    (found,) = run_ranks(1, answer, tmp_path / "again", alone, Prompt(prompt, [], torch.empty(0)))
    assert found == _greedy(tmp_path / "whole", prompt, load_tokenizer(alone.data.tokenizer).vocab_size, 8)


@torch.no_grad()
def _greedy(directory: Path, prompt: list[int], vocabulary: int, count: int) -> list[int]:
    """transformers' likeliest continuation."""
    model, tokens = Qwen2ForCausalLM.from_pretrained(directory).eval(), list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens])).logits[0, -1, :vocabulary]
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]
