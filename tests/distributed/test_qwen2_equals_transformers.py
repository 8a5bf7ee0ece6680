"""Logits and gradients of the engine's decoder against transformers' own Qwen2 on random weights."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from megatron_qwenvl.batch import Batch
from megatron_qwenvl.checkpoint.formats.hf_families import hf_decoder
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.model.build import build_stage, initialize_weights
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.unit.checkpoint.qwen2_cases import random_qwen2

from .harness import run_ranks
from .model_cases import SMALL_QWEN2, make_batch, small_config


def both_models(
    process: ProcessInfo, config: RunConfig, batch: Batch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits and gradients by hf name: of the engine's model, and of transformers' with the same weights."""
    theirs = random_qwen2(config.model.decoder)
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


def _transformers(model: Qwen2ForCausalLM, batch: Batch) -> dict[str, Tensor]:
    """Every segment by itself, as transformers knows no packs."""
    bounds = batch.cu_seqlens.tolist()
    segments = [batch.tokens[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    logits = torch.cat([model(tokens[None]).logits[0] for tokens in segments])
    logits.square().sum().backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def test_logits_and_gradients_equal_transformers() -> None:
    config = small_config(model=SMALL_QWEN2)
    batch = make_batch(1, 0, config)
    batch.labels = None
    ((ours, theirs),) = run_ranks(1, both_models, config, batch)
    assert ours.keys() == theirs.keys()
    assert theirs["logits"].std() > 0.3
    torch.testing.assert_close(ours["logits"], theirs["logits"], atol=1e-5, rtol=1e-5)
    for name, gradient in theirs.items():
        scale = gradient.abs().max()
        assert scale > 0
        torch.testing.assert_close(ours[name] / scale, gradient / scale, atol=1e-5, rtol=0, msg=name)
