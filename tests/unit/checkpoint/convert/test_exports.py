"""What an export lays down beside the weights, and that a damaged checkpoint is not exported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_qwenvl.checkpoint.convert.exports import execute_export, plan_export
from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_qwenvl
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import Manifest, read_manifest, write_manifest

from ..hf_cases import TINY, random_weights, write_hf

TOKENIZER = (
    "qwen.tiktoken", "tokenizer_config.json", "tokenization_qwen.py", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "modeling_qwen.py", "configuration_qwen.py", "SimSun.ttf",
)  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Imported weights."""
    execute_import(plan_qwenvl(write_hf(tmp_path / "hf", TINY, random_weights(TINY))), tmp_path / "megatron")
    return tmp_path / "megatron"


def became(checkpoint: Path, **changes: object) -> None:
    manifest = read_manifest(checkpoint).model_dump() | changes
    write_manifest(checkpoint, Manifest.model_validate(manifest))


def test_a_directory_gives_tokenizer_and_code_and_replaces_nothing(checkpoint: Path, tmp_path: Path) -> None:
    given = write_hf(tmp_path / "given", TINY, random_weights(TINY))
    for name in (*TOKENIZER, "generation_config.json", "model.safetensors", "README.md", "training_args.bin"):
        (given / name).write_text("theirs")
    execute_export(plan_export(checkpoint), tmp_path / "plain")
    execute_export(plan_export(checkpoint, given), tmp_path / "out")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    added = {p.name for p in (tmp_path / "out").iterdir()} - {p.name for p in (tmp_path / "plain").iterdir()}
    assert added == set(TOKENIZER)
    assert all((tmp_path / "out" / name).read_text() == "theirs" for name in added)


def test_copies_are_durable(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync

    def recording(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    (tmp_path / "qwen.tiktoken").write_text("tokens")
    execute_export(plan_export(checkpoint, tmp_path / "qwen.tiktoken"), tmp_path / "out")
    assert {"qwen.tiktoken", "config.json", "model.safetensors.index.json"} <= set(synced)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00001.safetensors"])
def test_a_file_that_is_no_tokenizer_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("theirs")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        plan_export(checkpoint, tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="empty: no tokenizer file"):
        plan_export(checkpoint, tmp_path / "empty")


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_flipped_bits_are_refused_file_by_file_and_nothing_remains(checkpoint: Path, tmp_path: Path) -> None:
    weights = next((checkpoint / "model").glob("*.distcp"))
    flip(weights, weights.stat().st_size // 2)
    flip(checkpoint / "model/common.pt", -1)
    with pytest.raises(CheckpointError) as caught:
        execute_export(plan_export(checkpoint), tmp_path / "out")
    message = str(caught.value)
    assert f"{weights}: damaged" in message and "model/common.pt: damaged" in message
    assert not list(tmp_path.glob("out*"))


def test_damage_that_cannot_be_read_is_named_by_digest(checkpoint: Path, tmp_path: Path) -> None:
    """A reader stumbles over the first item; the message names the whole file's damage all the same."""
    weights = next((checkpoint / "model").glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.distcp: damaged: expected sha256"):
        execute_export(plan_export(checkpoint), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_truncated_file_is_refused_before_anything_is_written(checkpoint: Path) -> None:
    """What `--dry_run` promises: sizes are checked."""
    weights = next((checkpoint / "model").glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"\.distcp: expected \d+ bytes, found"):
        plan_export(checkpoint)


def exported_json(checkpoint: Path, out: Path, name: str, **changes: object) -> Any:
    became(checkpoint, **changes)
    execute_export(plan_export(checkpoint), out)
    return json.loads((out / name).read_text())


def test_stage_3_gets_the_chat_model_s_generation(checkpoint: Path, tmp_path: Path) -> None:
    both = {"eos_token_id": 151643, "pad_token_id": 151643, "max_window_size": 6144, "max_new_tokens": 512}
    name = "generation_config.json"
    assert exported_json(checkpoint, tmp_path / "chat", name, origin="stage3", step=1) == {
        **both, "chat_format": "chatml", "do_sample": True, "top_k": 0, "top_p": 0.3,
    }  # fmt: skip
    base = {**both, "chat_format": "raw", "do_sample": False, "stop_words_ids": [[151643]]}
    for origin in ("stage2", "published"):
        assert exported_json(checkpoint, tmp_path / f"{origin}_out", name, origin=origin) == base


def test_a_note_says_that_the_code_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    (note,) = [note for note in plan_export(checkpoint).notes if "config.json names" in note]
    assert "configuration_qwen.py and modeling_qwen.py" in note
    given = tmp_path / "given"
    given.mkdir()
    for name in ("configuration_qwen.py", "modeling_qwen.py"):
        (given / name).write_text("")
    assert not [note for note in plan_export(checkpoint, given).notes if "config.json names" in note]
