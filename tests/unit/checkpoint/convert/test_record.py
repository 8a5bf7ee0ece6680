"""A conversion that is repeated, as by a requeued job, and what killed ones leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_qwenvl
from megatron_qwenvl.checkpoint.storage import new_directory as new_directory_module
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.new_directory import MAKER_NAME, new_directory
from megatron_qwenvl.commands import convert_checkpoint
from megatron_qwenvl.runtime.identity import ProcessIdentity

from ..hf_cases import TINY, random_weights, write_hf, write_parts
from .test_tool import became, run

pytestmark = pytest.mark.slow

COMMANDS = ("next-stage", "import-qwenvl", "import-parts", "export-qwenvl")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Published weights, parts, a tokenizer, and a checkpoint that went through stage 1."""
    write_hf(tmp_path / "hf", TINY, random_weights(TINY))
    execute_import(plan_qwenvl(tmp_path / "hf"), tmp_path / "trained")
    became(tmp_path / "trained", origin="stage1", step=50, recipe="tiny_stage1", image_size=28)
    write_parts(tmp_path / "parts", TINY, vocab=96)
    recipe = convert_checkpoint.RECIPES["tiny_stage1"]().model_copy(update={"model": TINY})
    monkeypatch.setitem(convert_checkpoint.RECIPES, "tiny_stage1", lambda: recipe)
    (tmp_path / "qwen.tiktoken").write_bytes(b"YQ== 0\n")
    return tmp_path


def arguments_of(command: str, place: Path) -> tuple[object, ...]:
    vit, llm = (
        place / "parts" / name for name in sorted(p.name for p in (place / "parts").iterdir())[::-1][:2]
    )
    return {
        "next-stage": ("--from", place / "trained", "--to", "stage2"),
        "import-qwenvl": ("--from", place / "hf"),
        "import-parts": ("--vit", vit, "--llm", llm, "--recipe", "tiny_stage1"),
        "export-qwenvl": ("--from", place / "trained", "--tokenizer", place / "qwen.tiktoken"),
    }[command]


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_repeated_it_is_a_success_that_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path, command: str
) -> None:
    arguments = (command, *arguments_of(command, place), "--out", place / "out")
    assert run(monkeypatch, *arguments) == 0
    before = content(place / "out")
    capsys.readouterr()
    for more in ((), ("--dry_run",)):
        assert run(monkeypatch, *arguments, *more) == 0
        assert f"{place}/out: complete, made before by the same command" in capsys.readouterr().out
    assert content(place / "out") == before
    assert {path.name for path in place.iterdir()} == {
        "hf",
        "parts",
        "trained",
        "qwen.tiktoken",
        "out",
    }
    if command != "export-qwenvl":
        assert run(monkeypatch, "verify", place / "out") == 0


def rewrite(path: Path) -> None:
    """Another byte near the end, under the same size and time."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_source_that_has_moved_on_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path, command: str
) -> None:
    arguments = (command, *arguments_of(command, place), "--out", place / "out")
    assert run(monkeypatch, *arguments) == 0
    before = content(place / "out")
    if command == "import-qwenvl":
        rewrite(next((place / "hf").glob("*.safetensors")))
    elif command == "import-parts":
        rewrite(
            max((place / "parts").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
        )
    elif command == "export-qwenvl":
        rewrite(place / "qwen.tiktoken")
    else:
        became(place / "trained", step=60)
    assert run(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert "exists already, but its source has moved on" in error and "remove it" in error
    assert content(place / "out") == before


def test_other_settings_and_an_incomplete_result_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    arguments = ("next-stage", "--from", place / "trained", "--to", "stage2", "--out", place / "out")
    assert run(monkeypatch, *arguments) == 0
    assert run(monkeypatch, *arguments, "--force") == 1
    assert "made otherwise: force was False, now True" in capsys.readouterr().err
    assert run(monkeypatch, "export-qwenvl", "--from", place / "trained", "--out", place / "out") == 1
    assert "command was next-stage, now export-qwenvl" in capsys.readouterr().err
    file = next((place / "out/model").glob("*.distcp"))
    os.truncate(file, 100)
    assert run(monkeypatch, *arguments) == 1
    assert f"model/{file.name} is damaged" in capsys.readouterr().err
    (place / "out/conversion.json").write_text("{")
    assert run(monkeypatch, *arguments) == 1
    assert "its conversion.json is damaged" in capsys.readouterr().err


# --- what killed conversions leave ------------------------------------------------------------------------------------


def left_by(maker: ProcessIdentity | None, parent: Path, digits: str = "0" * 12) -> Path:
    tmp_dir = parent / f"x.{digits}.tmp"
    tmp_dir.mkdir()
    (tmp_dir / "data").write_text("much")
    if maker:
        (tmp_dir / MAKER_NAME).write_text(json.dumps(asdict(maker)))
    return tmp_dir


ME = ProcessIdentity.of_this_process({})
ELSEWHERE = replace(ME, host="other", boot_id="another", job="17")


@pytest.mark.parametrize(
    ("maker", "over", "stays"),
    [
        (replace(ME, started="1"), None, False),
        (ME, None, True),
        (ELSEWHERE, True, False),
        (ELSEWHERE, False, True),
        (ELSEWHERE, None, True),
        (replace(ELSEWHERE, job=None), True, True),
        (None, True, True),
    ],
)
def test_only_what_a_dead_one_left_is_removed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    maker: ProcessIdentity | None,
    over: bool | None,
    stays: bool,
) -> None:
    monkeypatch.setattr(new_directory_module, "is_job_over", lambda job: over)
    tmp_dir = left_by(maker, tmp_path)
    with new_directory(tmp_path / "x"):
        pass
    assert tmp_dir.exists() == stays
    assert (tmp_path / "x").is_dir() and list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize("maker", [None, replace(ELSEWHERE, job=None)])
def test_of_an_unknown_maker_it_goes_when_it_is_old(tmp_path: Path, maker: ProcessIdentity | None) -> None:
    old, fresh = left_by(maker, tmp_path), left_by(maker, tmp_path, "1" * 12)
    for path in (*old.rglob("*"), old):
        os.utime(path, (1e9, 1e9))
    os.utime(fresh, (1e9, 1e9))  # something in it is new
    with new_directory(tmp_path / "x"):
        pass
    assert not old.exists() and fresh.exists()


def test_a_killed_conversion_is_tidied_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os, signal; from pathlib import Path\n"
        "from megatron_qwenvl.checkpoint.storage.new_directory import new_directory\n"
        f"with new_directory(Path({str(tmp_path / 'x')!r})) as tmp_dir: os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(CheckpointError), new_directory(tmp_path / "x"):
        assert len(list(tmp_path.iterdir())) == 1  # this one's
        raise CheckpointError("and this fails")
    assert list(tmp_path.iterdir()) == []
