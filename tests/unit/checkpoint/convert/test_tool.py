"""tools/convert_checkpoint.py as people run it: output, exit codes, one-line errors, nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_qwenvl.checkpoint.convert import jobs, next_stage
from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_qwenvl
from megatron_qwenvl.checkpoint.storage import file_checks, reading
from megatron_qwenvl.checkpoint.storage.manifest import Manifest, read_manifest, write_manifest
from megatron_qwenvl.checkpoint.storage.writing import FileRecord
from megatron_qwenvl.commands import convert_checkpoint

from ..hf_cases import TINY, random_weights, write_hf, write_parts

pytestmark = pytest.mark.slow


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the tool in this process."""
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
    return convert_checkpoint.main()


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint of weights that went through stage 1."""
    hf = write_hf(tmp_path / "hf", TINY, random_weights(TINY))
    execute_import(plan_qwenvl(hf), tmp_path / "trained")
    became(tmp_path / "trained", origin="stage1", step=50, recipe="tiny_stage1", image_size=28)
    return tmp_path / "trained"


def became(checkpoint: Path, **changes: object) -> None:
    """Let a checkpoint's manifest say something else."""
    manifest = read_manifest(checkpoint).model_dump() | changes
    write_manifest(checkpoint, Manifest.model_validate(manifest))


def test_next_stage_carries_the_weights_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "start2"
    assert run(monkeypatch, "next-stage", "--from", trained, "--to", "stage2", "--out", out) == 0
    captured = capsys.readouterr()
    assert "weights: stage1, step 50, to start stage2" in captured.out
    assert "images: 28 -> 56 pixels (tiny_stage2)" in captured.out
    assert "/s, 0:00 left" in captured.err
    manifest = read_manifest(out)
    assert (manifest.kind, manifest.origin, manifest.start_of) == ("weights", "stage1", "stage2")
    assert manifest.progress == {} and all(name.startswith("model/") for name in manifest.files)
    assert run(monkeypatch, "verify", out) == 0
    assert run(monkeypatch, "compare", trained, out) == 0
    assert "0 of " in capsys.readouterr().out


def test_next_stage_refuses_a_skipped_stage_unless_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    arguments = ("next-stage", "--from", trained, "--to", "stage3", "--out", tmp_path / "start3")
    assert run(monkeypatch, *arguments) == 1
    assert "stage3 starts from stage2 or published weights, found stage1" in capsys.readouterr().err
    assert not (tmp_path / "start3").exists()
    assert run(monkeypatch, *arguments, "--force") == 0
    assert read_manifest(tmp_path / "start3").start_of == "stage3"


def test_published_weights_can_start_any_stage(
    monkeypatch: pytest.MonkeyPatch, trained: Path, tmp_path: Path
) -> None:
    became(trained, origin="published", recipe="import-qwenvl", image_size=448)
    for stage in ("stage2", "stage3"):
        assert (
            run(monkeypatch, "next-stage", "--from", trained, "--to", stage, "--out", tmp_path / stage) == 0
        )


def test_next_stage_refuses_damage_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    file = next((trained / "model").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    out = tmp_path / "start2"
    assert run(monkeypatch, "next-stage", "--from", trained, "--to", "stage2", "--out", out) == 1
    assert f"{file}: damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob("start2*"))
    assert run(monkeypatch, "verify", trained) == 1
    assert f"{file}: damaged" in capsys.readouterr().out


def test_an_image_size_that_does_not_divide_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    model = TINY.model_copy(update={"vision": TINY.vision.model_copy(update={"patch_size": 15})})
    other = write_hf(tmp_path / "other", model, random_weights(model))
    execute_import(plan_qwenvl(other), tmp_path / "megatron")
    became(tmp_path / "megatron", origin="stage1", recipe="tiny_stage1")
    arguments = ("next-stage", "--to", "stage2", "--out", tmp_path / "x", "--from")
    assert run(monkeypatch, *arguments, tmp_path / "megatron") == 1
    assert "images of 56 pixels do not divide into patches of 15 pixels" in capsys.readouterr().err
    became(trained, model=model.model_dump())
    assert run(monkeypatch, *arguments, trained) == 1
    assert "conv1.weight: expected [24, 3, 15, 15], found [24, 3, 14, 14]" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["next-stage", "import-qwenvl", "export-qwenvl", "import-parts"])
def test_dry_run_writes_nothing_and_nothing_is_overwritten(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trained: Path,
    tmp_path: Path,
    command: str,
) -> None:
    vit, llm = write_parts(tmp_path / "parts", TINY, vocab=96)
    recipe = convert_checkpoint.RECIPES["tiny_stage1"]().model_copy(update={"model": TINY})
    monkeypatch.setitem(convert_checkpoint.RECIPES, "tiny_stage1", lambda: recipe)
    sources: dict[str, tuple[object, ...]] = {
        "next-stage": ("--from", trained, "--to", "stage2"),
        "import-qwenvl": ("--from", tmp_path / "hf"),
        "export-qwenvl": ("--from", trained),
        "import-parts": ("--vit", vit, "--llm", llm, "--recipe", "tiny_stage1"),
    }
    out = tmp_path / "out"
    arguments = (command, *sources[command], "--out", out)
    assert run(monkeypatch, *arguments, "--dry_run") == 0
    assert "would write 0.00" in capsys.readouterr().out
    assert not list(tmp_path.glob("out*"))
    assert run(monkeypatch, *arguments) == 0
    before = sorted(path.stat().st_mtime_ns for path in out.rglob("*"))
    (out / "conversion.json").rename(tmp_path / "kept")  # as an older version leaves it
    assert run(monkeypatch, *arguments) == 1
    assert "exists already; choose another name or remove it" in capsys.readouterr().err
    (tmp_path / "kept").rename(out / "conversion.json")
    assert sorted(path.stat().st_mtime_ns for path in out.rglob("*")) == before


def test_a_recipe_of_parts_may_be_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    vit, llm = write_parts(tmp_path / "parts", TINY, vocab=96)
    base = convert_checkpoint.RECIPES["tiny_stage1"]().model_copy(update={"model": TINY})
    monkeypatch.setitem(convert_checkpoint.RECIPES, "tiny_stage1", lambda: base)
    recipe = tmp_path / "own.yaml"
    recipe.write_text("base: tiny_stage1\nmodel: {init_std: 0.01}\n")
    arguments = ("import-parts", "--vit", vit, "--llm", llm, "--recipe", recipe, "--out", tmp_path / "out")
    assert run(monkeypatch, *arguments) == 0
    assert read_manifest(tmp_path / "out").model == TINY.model_copy(update={"init_std": 0.01})
    assert run(monkeypatch, *arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    recipe.write_text("base: tiny_stage1\nmodel: {init_std: 0.02}\n")
    assert run(monkeypatch, *arguments) == 1, "made with another content of the file"
    recipe.write_text("base: tiny_stage1\nmodle: {init_std: 0.02}\n")
    capsys.readouterr()
    assert run(monkeypatch, *arguments) == 2
    assert "modle" in capsys.readouterr().err


def test_inspect_tells_what_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path
) -> None:
    assert run(monkeypatch, "inspect", trained) == 0
    text = capsys.readouterr().out
    for expected in (
        "weights     stage1, step 50, recipe tiny_stage1",
        "ViT 2 x 24, decoder 2 x 32, vocabulary 96",
        "adapter.kv_proj.weight  float32[32, 24]",
        "model/__0_0.distcp",
    ):
        assert expected in text


def test_compare_exits_1_on_a_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    weights = random_weights(TINY)
    weights["lm_head.weight"][5, 5] += 1
    other = write_hf(tmp_path / "other", TINY, weights)
    assert run(monkeypatch, "compare", trained, other) == 1
    assert "output_layer.weight: 1 of 3,072 elements differ" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["stranger", "missing file", "foreign tensors"])
def test_verify_names_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path, change: str
) -> None:
    if change == "stranger":
        (trained / "model/extra.distcp").write_bytes(b"x")
        expected = "extra.distcp: does not belong"
    elif change == "missing file":
        (trained / "model/common.pt").unlink()
        expected = "common.pt: missing"
    else:
        decoder = TINY.decoder.model_copy(update={"layers": 1})
        became(trained, model=TINY.model_copy(update={"decoder": decoder}).model_dump())
        expected = "decoder.layers.1.mlp.linear_fc2.weight does not belong to the model"
    assert run(monkeypatch, "verify", trained) == 1
    assert expected in capsys.readouterr().out


def test_a_wrong_path_is_one_line_without_traceback(tmp_path: Path) -> None:
    tool = Path(__file__).parents[4] / "tools/convert_checkpoint.py"
    command = [sys.executable, str(tool), "inspect", str(tmp_path / "nothing")]
    environment = {**os.environ, "PYTHONPATH": str(tool.parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "not a checkpoint" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("convert",),
        ("next-stage", "--from", "a", "--to", "stage1", "--out", "b"),
        ("export-qwenvl", "--from", "a"),
        ("compare", "a", "b", "--tolerance", "small"),
        ("verify", "a", "--dry_run"),
    ],
)
def test_wrong_usage_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_a_killed_worker_is_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    """As the kernel does when memory runs out."""
    monkeypatch.setattr(next_stage, "copy_file", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    arguments = ("next-stage", "--from", trained, "--to", "stage2", "--out", tmp_path / "start2")
    assert run(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "next-stage: a worker process was killed; perhaps the machine ran out of memory"
    assert not list(tmp_path.glob("start2*"))


def test_progress_moves_within_a_file(monkeypatch: pytest.MonkeyPatch, trained: Path, tmp_path: Path) -> None:
    told: list[int] = []
    monkeypatch.setattr(reading, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(jobs, "_REPORT_SECONDS", 0.001)
    monkeypatch.setattr(next_stage, "copy_file", slow_copy)
    plan = next_stage.plan_transition(trained, "stage2")
    next_stage.execute_next_stage(plan, tmp_path / "start2", told.append)
    assert sum(told) == plan.manifest.total_bytes
    assert sum(count > 0 for count in told) > 2 * len(plan.manifest.files)


def slow_copy(source: Path, target: Path, record: FileRecord, on_bytes: file_checks.OnBytes) -> None:
    def count(size: int) -> None:
        on_bytes(size)
        time.sleep(0.005)

    file_checks.copy_file(source, target, record, count)
