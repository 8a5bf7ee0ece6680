"""From an imported chat model through training, a resume and the next stage to an export, and to a generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_qwenvl.checkpoint.convert.exports import execute_export, plan_export
from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_qwenvl
from megatron_qwenvl.checkpoint.convert.next_stage import execute_next_stage, plan_transition
from megatron_qwenvl.checkpoint.storage.manifest import read_manifest
from megatron_qwenvl.config.schema import ModelConfig, RunConfig
from megatron_qwenvl.data.rendering.tokenizer import load_tokenizer
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.inference.generate import Generator, Prompt
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks
from tests.reference_generation import PublishedGeneration
from tests.reference_model import ReferenceModel
from tests.unit.checkpoint.hf_cases import config_json, write_hf

from .training_cases import run_config, train, write_data

CHAT = {"chat_format": "chatml", "max_window_size": 2048, "top_p": 0.5}


def hf_chat(folder: Path, model: ModelConfig) -> tuple[Path, ReferenceModel]:
    """A chat model that was trained at 16 tokens, and what it computes."""
    torch.manual_seed(3)
    reference = ReferenceModel(model)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for layer in reference.transformer.h:
        layer.attn.c_attn.weight.data *= 4  # sharp attention, in which positions show
    write_hf(folder, model, reference.state_dict())
    (folder / "config.json").write_text(json.dumps(config_json(model, 56) | {"seq_length": 16}))
    (folder / "generation_config.json").write_text(json.dumps(CHAT))
    return folder, reference


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """The weights checkpoint of a published chat model with the shape that small runs have."""
    model = run_config(tmp_path, tmp_path / "run").model
    hf, _ = hf_chat(tmp_path / "hf", model)
    execute_import(plan_qwenvl(hf), tmp_path / "imported")
    return tmp_path / "imported"


def test_what_is_known_of_the_origin_comes_through_training(tmp_path: Path, imported: Path) -> None:
    data = write_data(tmp_path / "data", ("chat",))
    expected = read_manifest(imported).hf_metadata
    arguments = ("--checkpoint.init_from", str(imported), "--train.steps", "3", "--train.stop_after")
    for steps in ("1", "2", "3"):  # from the import, resumed, and to the end
        config = run_config(data.parent, tmp_path / "run", *arguments, steps, recipe="tiny_stage2")
        run_ranks(1, train, config)
    newest = tmp_path / "run/checkpoints/step_00000003"
    assert read_manifest(newest).hf_metadata == expected
    execute_next_stage(plan_transition(tmp_path / "run", "stage3"), tmp_path / "start3")
    assert read_manifest(tmp_path / "start3").hf_metadata == expected
    config = run_config(
        data.parent, tmp_path / "run3", "--checkpoint.init_from", str(tmp_path / "start3"), "--train.steps", "2",
        "--optimizer.warmup_steps", "1", recipe="tiny_stage3",
    )  # fmt: skip
    run_ranks(1, train, config)
    execute_export(plan_export(tmp_path / "run3"), tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text()) == CHAT
    assert json.loads((tmp_path / "again/config.json").read_text())["seq_length"] == 16


def answers(
    process: ProcessInfo, checkpoint: Path, config: RunConfig, prompts: list[Prompt]
) -> list[list[int]]:
    tokenizer = load_tokenizer(None)
    tokenizer.vocab_size = config.model.decoder.vocab_size
    generator = Generator.load(checkpoint, config, tokenizer, start_engine(config, process))
    return generator.generate(prompts, 6)


def test_a_generator_takes_the_trained_length_from_the_checkpoint(tmp_path: Path) -> None:
    config = run_config(tmp_path, tmp_path / "run")
    hf, reference = hf_chat(tmp_path / "hf", config.model)
    execute_import(plan_qwenvl(hf), tmp_path / "imported")
    rng = torch.Generator().manual_seed(1)
    prompts = [
        Prompt(torch.randint(0, 256, (n,), generator=rng).tolist(), [], torch.empty(0))
        for n in (14, 20, 40, 70, 90)
    ]
    (found,) = run_ranks(1, answers, tmp_path / "imported", config, prompts)

    def expected(**settings: Any) -> list[list[int]]:
        return [PublishedGeneration(reference, **settings).answer(prompt.tokens, 6) for prompt in prompts]

    assert found == expected(seq_length=16)
    assert found != expected(seq_length=2048), "the prompts do not show it"
