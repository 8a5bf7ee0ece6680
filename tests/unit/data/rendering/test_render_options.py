"""Options of rendering live in the index: lengths are right, every run renders alike, a change is noticed."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_qwenvl.commands.index_shards import main
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.loading.loader import build_loader
from megatron_qwenvl.data.rendering.token_builder import RenderOptions
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer
from megatron_qwenvl.data.shards.catalog import CATALOG_NAME
from megatron_qwenvl.data.shards.directory import open_directory
from megatron_qwenvl.data.shards.index import load_index
from megatron_qwenvl.data.shards.indexing import IndexJob, index_directory, index_shard
from tests.unit.data.data_cases import png_image, run_config, sample, write_shard
from tests.unit.data.test_image_kinds import encode

ATTEMPT = "<box>(1.5,2),(3,4)</box>"
CHAT = {
    "task": "chat",
    "conversations": [{"from": "user", "value": "Where?"}, {"from": "assistant", "value": f"At {ATTEMPT}"}],
}
GROUNDED = {
    "task": "grounded_caption",
    "caption": ["A man and ", {"ref": "his dog", "boxes": [[1, 1, 9, 9]]}, " play."],
}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A directory with a dialogue that holds an attempt at markup, and a grounded caption; not indexed."""
    samples = [sample("chat", CHAT), sample("grounded", GROUNDED, png=png_image())]
    write_shard(tmp_path / "data" / "0.tar", samples)
    return tmp_path / "data"


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["index_shards.py", *map(str, arguments), "--workers", "1"])
    return main()


def test_options_are_told_with_the_index_and_at_a_start(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: str) -> tuple[str, list[str]]:
        assert run_tool(monkeypatch, shards, *arguments) == 0
        sampler = build_loader(run_config(shards.parent, {shards.name: 1.0})).sampler
        return capsys.readouterr().out, sampler.source_notes()

    text, notes = told()
    assert "indexed with" not in text and "left out: markup" in notes[0] and len(notes) == 1
    text, notes = told("--ref_blank", "inside", "--unparsed_markup", "keep")
    assert "indexed with unparsed_markup keep, ref_blank inside" in text
    assert notes == ["data data: indexed with unparsed_markup keep, ref_blank inside"]


def texts(directory: Path, tokenizer: Tokenizer) -> str:
    """What a run over the directory reads."""
    config = run_config(directory.parent, {directory.name: 1.0}, global_batch_size=4, packing="none")
    batches = next(iter(build_loader(config)))
    return "".join(tokenizer.decode(batch.tokens.flatten().tolist()) for batch in batches)


def test_attempts_at_markup_are_left_out_and_told(
    shards: Path, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, shards) == 0
    told = capsys.readouterr().out
    assert f"1 left out: markup that does not parse: '{ATTEMPT}' (for example 0.tar:chat)" in told
    text = texts(shards, byte_level)
    assert "A man and" in text and "At <box>" not in text


def test_attempts_at_markup_can_be_kept_as_text(
    shards: Path, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_tool(monkeypatch, shards, "--unparsed_markup", "keep") == 0
    assert f"At {ATTEMPT}<|im_end|>" in texts(shards, byte_level)


def test_the_blank_may_stand_inside_the_reference(shards: Path, byte_level: Tokenizer) -> None:
    for where, written in (("outside", "A man and <ref>his"), ("inside", "A man and<ref> his")):
        index_directory(shards, IndexJob(options={"ref_blank": where}))
        assert written in texts(shards, byte_level)


def test_options_stay_until_they_are_changed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def indexed(*arguments: str) -> tuple[RenderOptions, bool]:
        before = (shards / "0.index.npz").stat().st_mtime_ns if (shards / "0.index.npz").exists() else 0
        assert run_tool(monkeypatch, shards, *arguments) == 0
        index = load_index(shards / "0.tar")
        assert index.options == open_directory(shards, index.tokenizer).catalog.options
        return index.options, (shards / "0.index.npz").stat().st_mtime_ns != before

    keep, both = RenderOptions(unparsed_markup="keep"), RenderOptions("keep", "inside")
    assert indexed() == (RenderOptions(), True)
    assert indexed("--unparsed_markup", "keep") == (keep, True)
    assert indexed() == (keep, False)
    assert indexed("--force") == (keep, True)
    assert indexed("--ref_blank", "inside") == (both, True)
    (shards / CATALOG_NAME).write_text("{")
    assert indexed() == (both, False)
    assert indexed("--unparsed_markup", "leave_out", "--ref_blank", "outside") == (RenderOptions(), True)


def test_an_index_with_other_options_is_noticed_and_the_command_helps(
    shards: Path, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_directory(shards, IndexJob(options={"unparsed_markup": "keep"}))
    index_shard(shards / "0.tar", IndexJob())  # as an interrupted change leaves it
    directory = open_directory(shards, byte_level.fingerprint)
    with pytest.raises(DataError, match="index and manifest differ") as caught:
        directory.load_index(0)
    command = re.search(r"run python tools/index_shards.py (.*)", str(caught.value))
    assert command and run_tool(monkeypatch, *shlex.split(command[1])) == 0
    assert open_directory(shards, byte_level.fingerprint).load_index(0).options.unparsed_markup == "keep"
    assert ATTEMPT in texts(shards, byte_level)


def test_notes_on_images_are_counted_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clear: dict[str, Any] = {"png": encode(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "PNG")}
    grey = {"png": encode(Image.new("I;16", (8, 8), 30_000), "PNG")}
    caption = {"task": "caption", "caption": "x"}
    samples = [sample(f"{number}", caption, **members) for number, members in enumerate([clear, grey, clear])]
    samples += [
        sample("3", {"task": "caption", "caption": ""}, **clear),
        sample("4", caption, png=png_image()),
    ]
    write_shard(tmp_path / "0.tar", samples)
    for _ in range(2):  # the second time the index is current
        assert run_tool(monkeypatch, tmp_path) == 0
        told = capsys.readouterr().out
        assert "2 images noted: alpha ignored: the colours below are shown (for example 0.tar:0)" in told
        assert "1 images noted: grey of more than 8 bits reduced to 8 (for example 0.tar:1)" in told
    assert load_index(tmp_path / "0.tar").arrays["noted_keys"].tolist() == [b"0", b"1", b"2"]
