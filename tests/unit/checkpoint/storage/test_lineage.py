"""Which weights start which stage, by `next-stage` and by a run that takes a checkpoint as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_qwenvl.checkpoint.convert.imports import execute_import, plan_qwenvl
from megatron_qwenvl.checkpoint.run.start import check_start
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import (
    HFMetadata,
    Manifest,
    _digest,
    read_manifest,
    write_manifest,
)
from megatron_qwenvl.commands import convert_checkpoint
from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.config.schema import RunConfig, Stage

from ..hf_cases import TINY, random_weights, write_hf


def manifest_of(origin: str, **more: object) -> Manifest:
    fields = {
        "kind": "training",
        "origin": origin,
        "recipe": "tiny",
        "model": TINY,
        "step": 100,
        "steps": 100,
    }
    return Manifest.model_validate(fields | more)


def run_of(stage: Stage) -> RunConfig:
    return RECIPES[f"tiny_{stage}"]().model_copy(update={"model": TINY})


@pytest.mark.parametrize(
    ("origin", "stage"),
    [("stage1", "stage2"), ("stage2", "stage3"), ("stage1", "stage1"), ("published", "stage3")],
)
def test_a_run_may_start_from_what_comes_before(origin: str, stage: Stage) -> None:
    kind = "weights" if origin == "published" else "training"
    check_start(Path("c"), manifest_of(origin, kind=kind), run_of(stage))


@pytest.mark.parametrize(
    ("origin", "stage"), [("stage1", "stage3"), ("stage2", "stage1"), ("stage3", "stage2")]
)
def test_a_run_refuses_a_training_checkpoint_of_another_stage(origin: str, stage: Stage) -> None:
    """Otherwise a stage-1 run's checkpoint would start stage 3 as it is, and stage 2 would be left out silently."""
    with pytest.raises(CheckpointError) as caught:
        check_start(Path("c"), manifest_of(origin), run_of(stage))
    message = str(caught.value)
    assert f"{stage} starts from " in message and f"found {origin}" in message
    assert f"next-stage --to {stage}" in message and "--force" in message


def test_a_run_refuses_an_unfinished_one_of_the_stage_before() -> None:
    unfinished = manifest_of("stage1", step=60)
    with pytest.raises(CheckpointError, match=r"stage1 was not finished: step 60 of 100 .*next-stage"):
        check_start(Path("c"), unfinished, run_of("stage2"))
    check_start(Path("c"), unfinished, run_of("stage1"))
    for unknown_or_forced in ({"steps": None}, {"kind": "weights", "start_of": "stage2"}):
        check_start(Path("c"), unfinished.model_copy(update=unknown_or_forced), run_of("stage2"))


def test_next_stage_refuses_an_unfinished_run_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "trained"
    execute_import(plan_qwenvl(write_hf(tmp_path / "hf", TINY, random_weights(TINY))), trained)
    files = read_manifest(trained).files
    write_manifest(trained, manifest_of("stage1", step=60, files=files))
    arguments = [
        "x",
        "next-stage",
        "--from",
        str(trained),
        "--to",
        "stage2",
        "--out",
        str(tmp_path / "start"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert convert_checkpoint.main() == 1
    assert "stage1 was not finished: step 60 of 100 (--force to do it anyway)" in capsys.readouterr().err
    assert not list(tmp_path.glob("start*"))
    monkeypatch.setattr(sys, "argv", [*arguments, "--force"])
    assert convert_checkpoint.main() == 0
    monkeypatch.setattr(sys, "argv", ["x", "inspect", str(tmp_path / "start")])
    assert convert_checkpoint.main() == 0
    assert "stage1, step 60 of 100" in capsys.readouterr().out
    check_start(tmp_path, read_manifest(tmp_path / "start"), run_of("stage2"))


def test_a_manifest_of_before_loads(tmp_path: Path) -> None:
    """Written when manifests did not say how many steps were planned."""
    content = manifest_of("stage1").model_dump(mode="json", by_alias=True)
    del content["steps"]
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "digest": _digest(content)}))
    assert read_manifest(tmp_path).steps is None


def test_stored_keys_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Names in code have changed since, the keys of the file have not."""
    hf_metadata = HFMetadata(seq_length=4096)
    manifest = manifest_of("stage1").model_copy(
        update={"hf_metadata": hf_metadata, "parallel_sizes": {"tensor": 2}}
    )
    write_manifest(tmp_path, manifest)
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content["published"]["seq_length"] == 4096 and content["layout"] == {"tensor": 2}
    assert not {"hf_metadata", "parallel_sizes"} & content.keys()
    assert read_manifest(tmp_path) == manifest
