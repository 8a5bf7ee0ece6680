"""Where a conversion writes: nothing that was there before is touched, whatever it is called."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_qwenvl
from megatron_qwenvl.checkpoint.convert.inspect import verify
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import Manifest, read_manifest, write_manifest
from megatron_qwenvl.checkpoint.storage.new_directory import new_directory
from megatron_qwenvl.commands import convert_checkpoint

from ..hf_cases import TINY, random_weights, write_hf


def test_a_neighbour_of_any_name_stays(tmp_path: Path) -> None:
    (tmp_path / "x.tmp").mkdir()
    (tmp_path / "x.tmp/precious").write_text("mine")
    with new_directory(tmp_path / "x") as tmp_dir:
        (tmp_dir / "file").write_text("new")
    assert (tmp_path / "x.tmp/precious").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"x", "x.tmp"}


def test_the_source_may_be_called_like_a_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "start2.tmp"
    execute_import(plan_qwenvl(write_hf(tmp_path / "hf", TINY, random_weights(TINY))), source)
    write_manifest(source, Manifest.model_validate(read_manifest(source).model_dump() | {"origin": "stage1"}))
    arguments = [
        "x",
        "next-stage",
        "--from",
        str(source),
        "--to",
        "stage2",
        "--out",
        str(tmp_path / "start2"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert convert_checkpoint.main() == 0
    assert verify(source) == verify(tmp_path / "start2") == []


def test_two_runs_with_one_target_do_not_destroy_each_other(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"), new_directory(tmp_path / "x") as first:
        (first / "file").write_text("first")
        with new_directory(tmp_path / "x") as second:
            (second / "file").write_text("second")
        assert (first / "file").read_text() == "first"
    assert (tmp_path / "x/file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_it_is_as_readable_as_any_directory(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with new_directory(tmp_path / "deep/x"):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "deep/x")]
    assert modes[0] == modes[1]


def test_source_and_target_may_not_lie_inside_one_another(tmp_path: Path) -> None:
    source = tmp_path / "a/source"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for target in (source / "x", source, tmp_path / "a", tmp_path / "link/x", source / "../source/x"):
        with pytest.raises(CheckpointError, match="lies inside"), new_directory(target, [source]):
            pass
    assert list(source.iterdir()) == []
    with new_directory(tmp_path / "a/source2", [source]):
        pass


@pytest.mark.parametrize("command", ["next-stage", "export-qwenvl", "import-qwenvl"])
@pytest.mark.parametrize("dry", [True, False])
def test_the_commands_refuse_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    dry: bool,
) -> None:
    hf = write_hf(tmp_path / "hf", TINY, random_weights(TINY))
    execute_import(plan_qwenvl(hf), tmp_path / "megatron")
    source = hf if command == "import-qwenvl" else tmp_path / "megatron"
    before = sorted(source.rglob("*"))
    extra = ["--to", "stage2"] if command == "next-stage" else []
    arguments = [command, "--from", str(source), *extra, "--out", str(source / "x"), *["--dry_run"] * dry]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    assert convert_checkpoint.main() == 1
    assert "lies inside" in capsys.readouterr().err
    assert sorted(source.rglob("*")) == before
