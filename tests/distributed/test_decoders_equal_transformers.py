"""Logits and gradients of the engine's decoder against transformers' own on random weights: Qwen2, and a family that is
added here as the documentation says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_qwenvl.batch import Batch
from megatron_qwenvl.checkpoint.formats.hf_families import hf_decoder
from megatron_qwenvl.config.schema import ModelConfig, RunConfig
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.model.build import build_stage, initialize_weights
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.model.shapes import tensor_shapes
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.unit.checkpoint.qwen2_cases import random_qwen2

from .harness import run_ranks
from .model_cases import SMALL_QWEN2, assemble, gradients_of, make_batch, small_config
from .qwen3_case import SMALL_QWEN3, add_qwen3, random_qwen3
from .test_parallel_equality import assert_equal


def both_models(
    process: ProcessInfo, config: RunConfig, batch: Batch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits and gradients by hf name: of the engine's model, and of transformers' with the same weights."""
    make = random_qwen3 if config.model.decoder.family == "qwen3" else random_qwen2
    theirs = make(config.model.decoder)
    weights = theirs.state_dict()
    stage = build_stage(config, start_engine(config, process), make_partition(config, 1)).eval()
    initialize_weights(stage, config.model, seed=0)
    entries = {entry.key: entry for entry in stage.sharded_state_dict().values()}
    rules = hf_decoder(config.model.decoder).rules(config.model.decoder)
    with torch.no_grad():
        for rule in rules:
            (value,) = rule.mapping.to_megatron([weights[name] for name in rule.hf])
            entries[rule.megatron[0]].data.copy_(value)
    logits = stage(batch, torch.arange(batch.length))
    logits.square().sum().backward()
    ours = {"logits": logits.detach()}
    for rule in rules:
        found = rule.mapping.to_hf([entries[rule.megatron[0]].data.grad])
        ours.update(zip(rule.hf, found, strict=True))
    return ours, _transformers(theirs, batch)


def _transformers(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """Every segment by itself, as transformers knows no packs."""
    bounds = batch.cu_seqlens.tolist()
    segments = [batch.tokens[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    logits = torch.cat([model(tokens[None]).logits[0] for tokens in segments])
    logits.square().sum().backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.fixture(autouse=True)
def third_family(monkeypatch: pytest.MonkeyPatch) -> None:
    add_qwen3(monkeypatch)


@pytest.mark.parametrize("model", [SMALL_QWEN2, SMALL_QWEN3], ids=["qwen2", "qwen3"])
def test_logits_and_gradients_equal_transformers(model: ModelConfig) -> None:
    config = small_config().model_copy(update={"model": model})
    batch = make_batch(1, 0, config)
    batch.labels = None
    ((ours, theirs),) = run_ranks(1, both_models, config, batch)
    assert ours.keys() == theirs.keys()
    assert theirs["logits"].std() > 0.3
    torch.testing.assert_close(ours["logits"], theirs["logits"], atol=1e-5, rtol=1e-5)
    for name, gradient in theirs.items():
        scale = gradient.abs().max()
        assert scale > 0
        torch.testing.assert_close(
            ours[name] / scale, gradient / scale, atol=5e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_an_added_family_is_the_same_over_tensor_and_pipeline_ranks() -> None:
    """Its norms of queries and keys are on every tensor-parallel rank, which has other heads."""
    config = small_config().model_copy(update={"model": SMALL_QWEN3})
    batches = [make_batch(i, images, config) for i, images in enumerate((2, 0))]
    (alone,) = run_ranks(1, gradients_of, config, batches)
    expected = {"report": alone["report"], "gradients": assemble(alone["gradients"])}
    assert expected["gradients"].keys() == tensor_shapes(SMALL_QWEN3).keys()
    parallel = small_config(tensor=2, pipeline=2, sequence_parallel=True).parallel
    layout = config.model_copy(update={"parallel": parallel})
    assert_equal(run_ranks(4, gradients_of, layout, batches), expected)
