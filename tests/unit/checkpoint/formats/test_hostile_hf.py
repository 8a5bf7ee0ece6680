"""Published files that are damaged or made to harm: each is refused in words, and none of them can name code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_qwenvl.checkpoint.convert.exports import execute_export, plan_export
from megatron_qwenvl.checkpoint.convert.imports import Import, execute_import, plan_qwenvl
from megatron_qwenvl.checkpoint.formats.names import TABLE_NAME
from megatron_qwenvl.checkpoint.run.owner_entries import read_entry
from megatron_qwenvl.checkpoint.run.rewind import RECORD, is_rewound
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.json_text import parse_json, show_json, show_name
from megatron_qwenvl.checkpoint.storage.manifest import MANIFEST_NAME, read_manifest, write_manifest
from megatron_qwenvl.checkpoint.storage.new_directory import MAKER_NAME, make_tmp_dir, remove_leftovers
from megatron_qwenvl.checkpoint.storage.safetensors_files import read_safetensors_header

from ..hf_cases import TINY, config_json, random_weights, write_hf

DEEP = {
    "cut": "[" * 100_000,
    "whole": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "within Python's limit": '{"a":' + "[" * 500 + "]" * 500 + "}",
}
"""JSON nested so deeply that Python's parser, or what handles the result, gives up."""

NORM = "transformer.ln_f.weight"


def save_single(folder: Path, weights: dict[Any, Any]) -> Path:
    """A published directory with one torch file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(TINY, 448)))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_deep_json_is_refused(tmp_path: Path, name: str, content: str) -> None:
    hf = write_hf(tmp_path / "p", TINY, random_weights(TINY))
    (hf / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{name}: not JSON: nested more than 64 levels"):
        plan_qwenvl(hf)


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
def test_deep_json_of_our_own_files_is_damage(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(tmp_path)
    (tmp_path / "1.json").write_text(content)
    assert read_entry(tmp_path / "1.json").process is None
    (tmp_path / "rewound_001").mkdir()
    (tmp_path / "rewound_001" / RECORD).write_text(content)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not is_rewound(tmp_path, 5)
    left, tmp_dir = make_tmp_dir(tmp_path / "out"), make_tmp_dir(tmp_path / "out")
    (left / MAKER_NAME).write_text(content)
    remove_leftovers(tmp_path / "out", tmp_dir)
    assert left.is_dir(), "its maker is not known, and it is new"


def test_what_is_read_is_what_was_written() -> None:
    value = {"a": [1, 2.5, None, True, "é"], "b": {"c": [[[]]]}}
    assert parse_json(json.dumps(value)) == parse_json(json.dumps(value).encode()) == value
    with pytest.raises(ValueError):
        parse_json(b"\xff\xff\xff\xff")
    assert show_json("4") == '"4"' and show_json(1e-6) == "1e-06" and len(show_json("x" * 10_000)) < 200
    assert show_name("visual.heads") == "visual.heads"
    assert show_name("a\n\x1b[1m\ud800") == '"a\\n\\u001b[1m\\ud800"'


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def entry(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: {**header, NORM: {**header[NORM], **values}}


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "deep": lambda header: b"[" * 200_000,
    "no object": lambda header: [1],
    "no object inside": lambda header: {**header, NORM: 5},
    "infinite shape": entry(shape=[float("inf")]),
    "shape of text": entry(shape=["32"]),
    "shape of fractions": entry(shape=[32.0]),
    "negative shape": entry(shape=[-4, -8]),
    "no shape": entry(shape=None),
    "offsets of text": entry(data_offsets=["0", "4"]),
    "one offset": entry(data_offsets=[4]),
    "fractions": lambda h: {**h, NORM: {**h[NORM], "data_offsets": [float(n) for n in h[NORM]["data_offsets"]]}},
    "unknown type": entry(dtype="X7"),
    "type that is no name": entry(dtype=["F32"]),
    "shared values": lambda header: {**header, NORM: header["transformer.h.0.ln_1.weight"]},
    "values of nobody": lambda header: {name: found for name, found in header.items() if name != NORM},
}  # fmt: skip


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_strange_safetensors_header_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    """The safetensors library, which the published code reads with, refuses each of them too."""
    path = tmp_path / "model.safetensors"
    save_file({name: value for name, value in random_weights(TINY).items() if "visual" not in name}, path)
    assert NORM in read_safetensors_header(path)
    change_header(path, change)
    with pytest.raises(SafetensorError), safe_open(path, "pt") as library:
        library.get_tensor(NORM)
    with pytest.raises(CheckpointError, match=path.name):
        read_safetensors_header(path)


def norm() -> Tensor:
    return random_weights(TINY)[NORM]


TORCH_FILES: dict[str, tuple[Callable[[], dict[Any, Any]], str]] = {
    "sparse": (lambda: {NORM: norm().to_sparse()}, f"{NORM}: expected plain values, found a sparse tensor"),
    "meta": (lambda: {NORM: norm().to("meta")}, f"{NORM}: expected plain values, found a tensor without values"),
    "key": (lambda: {1: norm()}, "expected a dictionary of tensors, found Tensor under 1"),
    "value": (lambda: {"step": 5}, "expected a dictionary of tensors, found int under 'step'"),
    "twice": (lambda: {NORM: norm(), f"module.{NORM}": norm() + 1}, f"holds {NORM} with and without `module.`"),
}  # fmt: skip


@pytest.mark.parametrize("case", TORCH_FILES)
def test_a_strange_torch_file_is_refused(tmp_path: Path, case: str) -> None:
    more, message = TORCH_FILES[case]
    hf = save_single(tmp_path / "p", {**random_weights(TINY), **more()})
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin: {message}"):
        plan_qwenvl(hf)


def test_an_index_that_names_two_files_for_a_tensor_is_refused(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "p", TINY, random_weights(TINY), safetensors=False)
    index = hf / "pytorch_model.bin.index.json"
    files: dict[str, str] = json.loads(index.read_text())["weight_map"]
    (other,) = set(files.values()) - {files[NORM]}
    torch.save({f"module.{NORM}": norm() + 1, **torch.load(hf / other)}, hf / other)
    index.write_text(json.dumps({"weight_map": {**files, f"module.{NORM}": other}}))
    with pytest.raises(CheckpointError, match=f"the index names another file for {NORM} too"):
        plan_qwenvl(hf)


def test_an_integer_table_is_called_so(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    weights[TABLE_NAME] = weights[TABLE_NAME].long()
    with pytest.raises(
        CheckpointError, match=r"pos_embed: expected floating-point numbers, found int64\[4, 32\]"
    ):
        plan_qwenvl(write_hf(tmp_path / "p", TINY, weights))


CODE: dict[str, Any] = {
    "auto_map": {"AutoModelForCausalLM": "evil.X"},
    "custom_generate": "evil/repo",
    "_from": "evil",
}


def imported(folder: Path, generation: dict[str, Any]) -> Import:
    hf = write_hf(folder / "p", TINY, random_weights(TINY))
    (hf / "generation_config.json").write_text(json.dumps(generation))
    plan = plan_qwenvl(hf)
    execute_import(plan, folder / "megatron")
    return plan


def test_generation_settings_name_no_code(tmp_path: Path) -> None:
    good: dict[str, Any] = {"chat_format": "chatml", "top_p": 0.5, "stop_words_ids": [[5]]}
    plan = imported(tmp_path, good | CODE)
    (note,) = [note for note in plan.notes if "not kept for an export" in note]
    assert note.endswith("generation_config.json: not kept for an export: _from, auto_map, custom_generate")
    manifest = read_manifest(tmp_path / "megatron")
    assert manifest.hf_metadata is not None and manifest.hf_metadata.generation == good
    older = manifest.hf_metadata.model_copy(update={"generation": good | CODE})  # kept by an earlier version
    write_manifest(tmp_path / "megatron", manifest.model_copy(update={"hf_metadata": older}))
    execute_export(plan_export(tmp_path / "megatron"), tmp_path / "again")
    assert json.loads((tmp_path / "again/generation_config.json").read_text()) == good


@pytest.mark.parametrize("chat_format", [None, ["chatml"], 5, {"chatml": 1}], ids=str)
def test_a_chat_format_is_a_name(tmp_path: Path, chat_format: object) -> None:
    with pytest.raises(CheckpointError, match='chat_format: expected "raw" or "chatml", found'):
        imported(tmp_path, {"chat_format": chat_format})


def test_half_a_character_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'generation_config.json: not text: "\\ud800"'):
        imported(tmp_path, {"chat_format": "\ud800"})


@pytest.mark.slow
def test_a_strict_terminal_is_told_strange_names(tmp_path: Path) -> None:
    """Neither a path of any bytes nor a key that is no text ends the tool with an encoding error."""
    hf = write_hf(tmp_path / "p\udcff", TINY, random_weights(TINY))
    config: dict[str, Any] = config_json(TINY, 448)
    config["visual"]["\ud800\n"] = 1
    (hf / "config.json").write_text(json.dumps(config))
    tool = Path(__file__).parents[4] / "tools/convert_checkpoint.py"
    done = subprocess.run(
        [sys.executable, tool, "import-qwenvl", "--from", hf, "--out", tmp_path / "out", "--dry_run"],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'visual."\\ud800\\n" is not known' in done.stdout and "p\\udcff" in done.stdout
