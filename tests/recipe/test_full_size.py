"""The full-size stages as they are built: the numbers of the recipes reach the modules, groups and rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.config.schema import RunConfig, RuntimeConfig
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.model.engine_config import build_engine_configs
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.model.stage import QwenVLStage
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks


def built(process: ProcessInfo, config: RunConfig) -> dict[str, Any]:
    """Settings of the modules of a whole model, built on the meta device."""
    runtime = start_engine(config, process)
    with torch.device("meta"):
        configs = build_engine_configs(config, runtime.kernels, on_gpu=False)
        layers = make_partition(config, 1).layers
        stage = QwenVLStage(config.model, configs, layers, runtime.kernels, runtime.groups)
    norms = {name: m for name, m in stage.named_modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)}
    return {
        "norms": {name: (type(norm).__name__, norm.eps) for name, norm in norms.items()},
        "dropout": {
            part.hidden_dropout + part.attention_dropout
            for part in (configs.vit, configs.full_sequence, configs.decoder)
        },
        "modules_with_dropout": [
            name for name, m in stage.named_modules() if isinstance(m, nn.Dropout) and m.p > 0
        ],
    }


@pytest.fixture(scope="module")
def model() -> dict[str, Any]:
    """The three stages share one model (see `test_recipes.py`); a CPU builds the same modules."""
    config = RECIPES["stage1"]().model_copy(update={"runtime": RuntimeConfig(device="cpu")})
    (found,) = run_ranks(1, built, config)
    return found


def test_every_norm_has_the_published_kind_and_epsilon(model: dict[str, Any]) -> None:
    """ViT with `ln_pre` and adapter: LayerNorm 1e-6, as the published code; decoder: RMSNorm 1e-6."""
    norms = model["norms"]
    decoder = {name for name in norms if name.startswith("decoder.")}
    assert {norms[name] for name in decoder} == {("RMSNorm", 1e-6)}
    assert {norms[name] for name in norms.keys() - decoder} == {("LayerNorm", 1e-6)}
    assert "patch_embed.ln_pre" in norms
    assert {name for name in norms if name.startswith("adapter.")} == {
        "adapter.ln_q",
        "adapter.ln_kv",
        "adapter.ln_post",
    }
    assert len(decoder) == 2 * 32 + 1
    assert len(norms) == len(decoder) + 2 * 48 + 1 + 3


def test_nothing_is_dropped(model: dict[str, Any]) -> None:
    """Drop path, hidden and attention dropout are 0 in every stage."""
    assert model["dropout"] == {0.0}
    assert model["modules_with_dropout"] == []
