"""What a published directory says beside its weights comes back from an export; a drifted table is taken on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights, table_notes
from megatron_qwenvl.checkpoint.convert.exports import execute_export, plan_export
from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_qwenvl
from megatron_qwenvl.checkpoint.convert.next_stage import execute_next_stage, plan_transition
from megatron_qwenvl.checkpoint.formats.names import TABLE_NAME
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import Manifest, read_manifest, write_manifest
from megatron_qwenvl.model.positions import sincos_table

from ..hf_cases import TINY, random_weights, write_hf

pytestmark = pytest.mark.slow

CHAT: dict[str, Any] = {
    "chat_format": "chatml", "do_sample": True, "eos_token_id": 151643, "max_new_tokens": 1024, "max_window_size": 2048,
    "pad_token_id": 151643, "top_k": 0, "top_p": 0.5, "stop_words_ids": [[151645]], "repetition_penalty": 1.1,
}  # fmt: skip


def imported(tmp_path: Path, generation: dict[str, Any] | None) -> Path:
    hf = write_hf(tmp_path / "hf", TINY, random_weights(TINY))
    if generation is not None:
        (hf / "generation_config.json").write_text(
            json.dumps({**generation, "transformers_version": "4.31.0"})
        )
    execute_import(plan_qwenvl(hf), tmp_path / "megatron")
    return tmp_path / "megatron"


def exported(checkpoint: Path, out: Path) -> dict[str, Any]:
    plan = plan_export(checkpoint)
    execute_export(plan, out)
    generation: dict[str, Any] = json.loads((out / "generation_config.json").read_text())
    assert f"(chat_format {generation['chat_format']})" in plan.notes[0]
    return generation


def became(checkpoint: Path, **changes: object) -> None:
    manifest = read_manifest(checkpoint).model_dump() | changes
    write_manifest(checkpoint, Manifest.model_validate(manifest))


def test_a_chat_model_comes_back_as_one(tmp_path: Path) -> None:
    checkpoint = imported(tmp_path, CHAT)
    assert exported(checkpoint, tmp_path / "again") == CHAT
    execute_next_stage(plan_transition(checkpoint, "stage3"), tmp_path / "start3")
    assert exported(tmp_path / "start3", tmp_path / "start3_again") == CHAT
    execute_import(plan_qwenvl(tmp_path / "again"), tmp_path / "twice")  # an export is a published directory
    assert exported(tmp_path / "twice", tmp_path / "twice_again") == CHAT


@pytest.mark.parametrize(
    ("origin", "generation", "expected"),
    [
        ("stage3", CHAT, CHAT),
        ("stage3", {"chat_format": "raw", "top_p": 0.9}, {"chat_format": "chatml", "top_p": 0.3}),
        ("stage3", None, {"chat_format": "chatml", "top_p": 0.3}),
        ("stage2", CHAT, {"chat_format": "raw", "do_sample": False}),  # trained on plain text since
        ("stage1", {"chat_format": "raw", "top_p": 0.9}, {"chat_format": "raw", "top_p": 0.9}),
        ("published", {"chat_format": "raw", "top_p": 0.9}, {"chat_format": "raw", "top_p": 0.9}),
        ("published", None, {"chat_format": "raw", "do_sample": False}),
    ],
)
def test_the_last_training_decides_whether_it_chats(
    tmp_path: Path, origin: str, generation: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    checkpoint = imported(tmp_path, generation)
    became(checkpoint, origin=origin)
    assert exported(checkpoint, tmp_path / "again").items() >= expected.items()


def test_a_checkpoint_that_says_nothing_still_exports(tmp_path: Path) -> None:
    """As those do that were written before anything was kept."""
    checkpoint = imported(tmp_path, CHAT)
    content = read_manifest(checkpoint).model_dump(mode="json")
    del content["hf_metadata"]
    write_manifest(checkpoint, Manifest.model_validate(content))
    assert exported(checkpoint, tmp_path / "again")["chat_format"] == "raw"
    assert any(
        "whether the imported model chats is not known" in note for note in plan_export(checkpoint).notes
    )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", "{", "generation_config.json: not JSON"),
        ("generation_config.json", '{"top_p": NaN}', "generation_config.json: not JSON: holds nan"),
        ("config.json", {"seq_length": "long"}, "config.json: seq_length: "),
        ("config.json", {"use_logn_attn": "yes"}, "config.json: use_logn_attn: "),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path: Path, file: str, content: Any, message: str) -> None:
    hf = write_hf(tmp_path / "hf", TINY, random_weights(TINY))
    if isinstance(content, dict):
        content = json.dumps(json.loads((hf / file).read_text()) | content)
    (hf / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        plan_qwenvl(hf)


def with_drift(tmp_path: Path, drift: torch.Tensor | float, dtype: torch.dtype = torch.float32) -> Path:
    weights = random_weights(TINY, dtype)
    weights[TABLE_NAME] = (sincos_table(2, 32) + drift).to(dtype)
    return write_hf(tmp_path / "drifted", TINY, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_trained_table_is_taken_on_request_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    drift = torch.zeros(4, 32)
    drift[1, 3], drift[2] = 0.25, -0.03125
    hf = with_drift(tmp_path, drift, dtype)
    far = r"by 0.25 at most and 0.009\d? on average"
    with pytest.raises(CheckpointError, match=rf"{far}.*--accept_drift"):
        plan_qwenvl(hf)
    plan = plan_qwenvl(hf, accept_drift=True)
    assert any("the imported model has the constant table" in note for note in plan.notes)
    execute_import(plan, tmp_path / "megatron")
    assert read_manifest(tmp_path / "megatron").hf_metadata.table_drift == pytest.approx(0.25, abs=1e-2)
    assert compare(open_weights(hf), open_weights(tmp_path / "megatron")) == []
    (note,) = table_notes(hf)
    assert "has drifted from the constant sin-cos table" in note
    export = plan_export(tmp_path / "megatron")
    assert any("is the constant table; the imported one differed by 0.25" in note for note in export.notes)
    execute_export(export, tmp_path / "again")
    plan_qwenvl(tmp_path / "again")  # has the constant table, so that nothing needs accepting


@pytest.mark.parametrize(
    ("drift", "message"),
    [(0.2, "but another one"), (float("nan"), "not finite"), (float("inf"), "not finite")],
    ids=str,
)
def test_another_table_is_no_drift(tmp_path: Path, drift: float, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan_qwenvl(with_drift(tmp_path, drift), accept_drift=True)


def test_another_vocabulary_than_the_imported_one_is_said(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", TINY, random_weights(TINY))
    (hf / "qwen.tiktoken").write_text("words")
    execute_import(plan_qwenvl(hf), tmp_path / "megatron")
    assert any("without qwen.tiktoken" in note for note in plan_export(tmp_path / "megatron").notes)
    assert not any("qwen.tiktoken" in note for note in plan_export(tmp_path / "megatron", hf).notes)
    (hf / "qwen.tiktoken").write_text("other words")
    assert any(
        "not the vocabulary of the imported" in n for n in plan_export(tmp_path / "megatron", hf).notes
    )


def test_a_manifest_cannot_make_an_export_name_code(tmp_path: Path) -> None:
    checkpoint = imported(tmp_path, CHAT)
    kept = {"config": {"auto_map": {"AutoConfig": "someone/else--code.Config"}, "use_cache": False}}
    became(checkpoint, hf_metadata={**read_manifest(checkpoint).hf_metadata.model_dump(), **kept})
    execute_export(plan_export(checkpoint), tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["use_cache"] is False and "someone" not in json.dumps(config)
