"""Qwen2's decoder in the Hugging Face format: import from transformers' files, and export of the whole model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights
from megatron_qwenvl.checkpoint.convert.exports import execute_export, plan_export
from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_parts, plan_qwenvl
from megatron_qwenvl.checkpoint.formats.config_keys import NAMES
from megatron_qwenvl.checkpoint.formats.hf_families import HF_DECODERS
from megatron_qwenvl.checkpoint.formats.mappings import InterleavedHeads
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import HFMetadata, read_manifest
from megatron_qwenvl.config.schema import DecoderConfig, RunConfig
from tests.distributed.model_cases import SMALL_QWEN2
from tests.unit.checkpoint.qwen2_cases import RUN, change_config, write_qwen2_parts

REAL_CONFIG = {  # the keys of the published config.json of Qwen2.5-7B, with this test's sizes
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 56, "initializer_range": 0.02, "intermediate_size": 72,
    "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_qwen2_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def imported(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "start"
    execute_import(plan_parts(*parts, RUN, seed=1), out)
    return out


@pytest.fixture(scope="module")
def exported(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "whole"
    execute_export(plan_export(imported), out)
    return out


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def test_a_decoder_comes_back_bitwise_under_transformers_names(
    parts: tuple[Path, Path], exported: Path
) -> None:
    original, whole = tensors_of(parts[1]), tensors_of(exported)
    decoder = {name: tensor for name, tensor in whole.items() if not name.startswith("transformer.visual.")}
    assert decoder.keys() == original.keys()
    assert all(torch.equal(decoder[name], tensor) for name, tensor in original.items())
    assert len(whole) - len(decoder) == 4 + 4 * 12 + 14  # stem, layers, adapter with its table


def test_transformers_loads_the_decoder_of_an_export(parts: tuple[Path, Path], exported: Path) -> None:
    tokens = torch.arange(20)[None] * 5 % 128
    with torch.no_grad():
        original = Qwen2ForCausalLM.from_pretrained(parts[1]).eval()(tokens).logits
        again = Qwen2ForCausalLM.from_pretrained(exported).eval()(tokens).logits
    assert torch.equal(original, again)


def test_an_export_is_read_back_bitwise(imported: Path, exported: Path, tmp_path: Path) -> None:
    execute_import(plan_qwenvl(exported), tmp_path / "again")
    model = read_manifest(tmp_path / "again").model.model_copy(update={"init_std": SMALL_QWEN2.init_std})
    assert model == read_manifest(imported).model == SMALL_QWEN2
    a, b = open_weights(imported), open_weights(tmp_path / "again")
    assert a.specs.keys() == b.specs.keys()
    assert compare(a, b, 0.0, lambda _: None) == []


def test_the_configuration_of_an_export_says_what_it_is(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    assert config["num_key_value_heads"] == 2 and config["intermediate_size"] == 72
    assert config["rope_theta"] == 1e6 and config["max_position_embeddings"] == 4096
    assert config["visual"]["image_start_id"] == 151652 and config["visual"]["output_dim"] == 56
    assert "auto_map" not in config


def test_the_metadata_of_qwen2_switch_the_extension_off(imported: Path) -> None:
    found = read_manifest(imported).hf_metadata
    assert found is not None
    assert (found.seq_length, found.use_dynamic_ntk, found.use_logn_attn) == (4096, False, False)


def test_the_published_configuration_of_qwen2_5_is_taken_without_a_note(parts: tuple[Path, Path]) -> None:
    found = HF_DECODERS["qwen2"].compare(Path("config.json"), REAL_CONFIG, SMALL_QWEN2.decoder)
    assert (found.problems, found.notes) == ([], [])


def test_the_configuration_that_transformers_saves_is_taken_without_a_note(parts: tuple[Path, Path]) -> None:
    saved = json.loads((parts[1] / "config.json").read_text())
    found = HF_DECODERS["qwen2"].compare(Path("config.json"), saved, SMALL_QWEN2.decoder)
    assert (found.problems, found.notes) == ([], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window: expected false, found true"),
        (
            {"layer_types": ["sliding_attention"] * 3},
            'layer_types: expected "full_attention" for every layer',
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: expected nothing, found"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
            'rope_parameters.rope_type: expected "default", found "yarn"',
        ),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected false, found true"),
        ({"hidden_act": "gelu"}, 'hidden_act: expected "swiglu" or "silu" or "swish", found "gelu"'),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps: expected 1e-06, found 1e-05"),
        ({"rope_theta": 10000.0}, "rope_theta: expected 1000000, found 10000.0"),
        ({"rope_theta": None}, "rope_theta: expected 1000000, found nothing, which means 10000.0"),
        ({"num_key_value_heads": 7}, "num_key_value_heads: expected 2, found 7"),
        ({"num_key_value_heads": None}, "num_key_value_heads: expected 2, found nothing, which means 32"),
        ({"num_attention_heads": 28}, "num_attention_heads: expected 14, found 28"),
        ({"model_type": "qwen2_vl"}, 'model_type: expected "qwen2", found "qwen2_vl"'),
        ({"model_type": "qwen3"}, 'model_type: expected "qwen2", found "qwen3"'),
        ({"use_mrope": True}, "use_mrope: expected nothing, found true"),
        ({"qk_norm": True}, "qk_norm: expected nothing, found true"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: expected nothing"),
    ],
)
def test_a_decoder_that_computes_something_else_is_refused(changes: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in {**REAL_CONFIG, **changes}.items() if value is not None}
    found = HF_DECODERS["qwen2"].compare(Path("llm/config.json"), config, SMALL_QWEN2.decoder)
    assert found.problems[0].startswith(f"llm/config.json: {message}"), found.problems
    named = {problem.split(": ")[1].split(".")[0] for problem in found.problems}
    assert named == set(changes)


def test_all_differences_are_named_at_once(tmp_path: Path) -> None:
    vit, llm = write_qwen2_parts(tmp_path)
    change_config(llm, use_sliding_window=True, rms_norm_eps=1e-5)
    with pytest.raises(CheckpointError, match=r"rms_norm_eps: .*; .*use_sliding_window: "):
        plan_parts(vit, llm, RUN, seed=1)


def test_the_other_family_is_refused_in_both_directions(parts: tuple[Path, Path]) -> None:
    vit, llm = parts
    qwen = RUN.model.decoder.model_copy(update={"family": "qwen", "query_groups": None})
    recipe = RunConfig(model=SMALL_QWEN2.model_copy(update={"decoder": qwen}))
    with pytest.raises(CheckpointError, match='model_type: expected "qwen", found "qwen2"'):
        plan_parts(vit, llm, recipe, seed=1)


def test_an_output_layer_that_is_tied_is_missing(tmp_path: Path) -> None:
    vit, llm = write_qwen2_parts(tmp_path)
    weights = load_file(llm / "model.safetensors")
    del weights["lm_head.weight"]
    torch.save(weights, llm / "pytorch_model.bin")
    (llm / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{llm}: tensor lm_head.weight is missing")):
        plan_parts(vit, llm, RUN, seed=1)


def test_absent_keys_mean_transformers_defaults() -> None:
    config = Qwen2Config()
    for name, value in HF_DECODERS["qwen2"].defaults.items():
        found = config.rope_parameters["rope_theta"] if name == "rope_theta" else getattr(config, name)
        assert found == value, name


def test_every_family_has_its_format() -> None:
    values = DecoderConfig.model_fields["family"].annotation
    assert set(HF_DECODERS) == set(values.__args__)  # type: ignore[union-attr]
    for known in HF_DECODERS.values():
        assert set(known.needed) <= NAMES.keys()
        assert known.new_metadata().use_dynamic_ntk == (known.family == "qwen")
        assert isinstance(known.new_metadata(), HFMetadata)


@pytest.mark.parametrize("hf_tensors", [1, 3])
def test_rows_of_grouped_heads(hf_tensors: int) -> None:
    """Two groups of three heads of two channels, every row named by its place in [q; k; v]."""
    mapping = InterleavedHeads(heads=6, hf_tensors=hf_tensors, query_groups=2)
    hf = [torch.arange(20.0)] if hf_tensors == 1 else list(torch.arange(20.0).split((12, 4, 4)))
    (megatron,) = mapping.to_megatron(hf)
    first_group = [*range(6), 12, 13, 16, 17]
    assert megatron.tolist() == [*first_group, *range(6, 12), 14, 15, 18, 19]
    assert all(torch.equal(a, b) for a, b in zip(mapping.to_hf([megatron]), hf, strict=True))
