"""A family added as docs/families.md says: its files pass through import and export and are transformers' own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights
from megatron_qwenvl.checkpoint.convert.exports import execute_export, plan_export
from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_parts, plan_qwenvl
from megatron_qwenvl.checkpoint.formats.hf_families import HF_DECODERS
from megatron_qwenvl.checkpoint.storage.manifest import Manifest, read_manifest
from megatron_qwenvl.config.schema import DecoderConfig, ModelConfig, RunConfig
from tests.distributed.qwen3_case import SMALL_QWEN3, add_qwen3, random_qwen3
from tests.unit.checkpoint.hf_cases import open_clip_weights
from tests.unit.checkpoint.qwen2_cases import change_config


@pytest.fixture(autouse=True)
def third_family(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Add the family, its name in the schema included."""
    add_qwen3(monkeypatch)
    field = DecoderConfig.model_fields["family"]
    known = field.annotation
    _set_families(Literal["qwen", "qwen2", "qwen3"])
    yield
    _set_families(known)


def _set_families(names: object) -> None:
    DecoderConfig.model_fields["family"].annotation = names  # type: ignore[assignment]
    for model in (DecoderConfig, ModelConfig, RunConfig, Manifest):
        model.model_rebuild(force=True)


def test_files_of_a_third_family_pass_through_import_and_export(tmp_path: Path) -> None:
    vit, llm = tmp_path / "vit", tmp_path / "llm"
    vit.mkdir()
    save_file(open_clip_weights(SMALL_QWEN3), vit / "open_clip_model.safetensors")
    original = random_qwen3(SMALL_QWEN3.decoder)
    original.save_pretrained(llm)

    execute_import(plan_parts(vit, llm, RunConfig(model=SMALL_QWEN3), seed=1), tmp_path / "start")
    execute_export(plan_export(tmp_path / "start"), tmp_path / "whole")
    execute_import(plan_qwenvl(tmp_path / "whole"), tmp_path / "again")

    assert read_manifest(tmp_path / "again").model.decoder == SMALL_QWEN3.decoder
    a, b = open_weights(tmp_path / "start"), open_weights(tmp_path / "again")
    assert a.specs.keys() == b.specs.keys() and compare(a, b, 0.0, lambda _: None) == []
    tokens = torch.arange(20)[None] * 5 % 128
    with torch.no_grad():
        again = Qwen3ForCausalLM.from_pretrained(tmp_path / "whole").eval()(tokens).logits
        assert torch.equal(original(tokens).logits, again)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])


def test_an_absent_head_size_means_transformers_default(tmp_path: Path) -> None:
    random_qwen3(SMALL_QWEN3.decoder).save_pretrained(tmp_path)
    change_config(tmp_path, head_dim=None)
    config = json.loads((tmp_path / "config.json").read_text())
    found = HF_DECODERS["qwen3"].compare(tmp_path / "config.json", config, SMALL_QWEN3.decoder)
    default = Qwen3Config().head_dim
    assert found.problems == [
        f"{tmp_path / 'config.json'}: head_dim: expected 4, found nothing, which means {default}"
    ]
