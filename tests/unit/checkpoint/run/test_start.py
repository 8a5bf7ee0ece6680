"""What a run would start from, by manifests alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_qwenvl.checkpoint.run.start import Start, find_start
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.manifest import Manifest, write_manifest
from megatron_qwenvl.checkpoint.storage.writing import write_bytes
from megatron_qwenvl.config.load import load_config
from megatron_qwenvl.config.schema import ModelConfig, RunConfig, Stage


def run(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config("tiny_stage2", ["--run_dir", str(tmp_path / "run"), *overrides])


def checkpoint(
    path: Path, model: ModelConfig, stage: Stage = "stage2", start_of: Stage | None = None
) -> Path:
    """A checkpoint with one small file; of training, or, if made to start a stage, of weights."""
    (path / "model").mkdir(parents=True)
    record = write_bytes(path / "model/data", b"1234")
    kind = "training" if start_of is None else "weights"
    files = {"model/data": record}
    manifest = Manifest(kind=kind, origin=stage, start_of=start_of, recipe="x", model=model, files=files)
    write_manifest(path, manifest)
    return path


def own(config: RunConfig, step: int) -> Path:
    return checkpoint(Path(config.run_dir) / f"checkpoints/step_{step:08d}", config.model, config.stage)


def test_nothing_is_a_fresh_start(tmp_path: Path) -> None:
    assert find_start(run(tmp_path)) == Start(None, None)


def test_the_newest_of_its_own_comes_before_given_weights(tmp_path: Path) -> None:
    config = run(tmp_path, "--checkpoint.init_from", str(tmp_path / "missing"))
    own(config, 10)
    newest = own(config, 20)
    (newest.parent / "step_00000030.tmp").mkdir()
    start = find_start(config)
    assert (start.checkpoint, start.damaged) == (newest, ())


def test_a_checkpoint_between_the_two_renames_of_a_save_counts(tmp_path: Path) -> None:
    """A crash after the older checkpoint of a step was renamed, before the new one of that step got the name."""
    config = run(tmp_path)
    own(config, 10)
    newest = own(config, 20)
    replaced = newest.rename(newest.with_suffix(".old"))
    assert find_start(config).checkpoint == replaced
    assert find_start(config, from_step=20).checkpoint == replaced
    own(config, 20)  # the renames are complete
    assert find_start(config).checkpoint == newest


@pytest.mark.parametrize("damage", ["manifest", "size", "missing"])
def test_a_damaged_one_is_passed_over_and_named(tmp_path: Path, damage: str) -> None:
    config = run(tmp_path)
    older, newest = own(config, 10), own(config, 20)
    broken = newest / ("manifest.json" if damage == "manifest" else "model/data")
    if damage == "missing":
        broken.unlink()
    else:
        broken.write_text("{")
    start = find_start(config)
    assert start.checkpoint == older
    assert len(start.damaged) == 1 and str(broken) in start.damaged[0]
    (older / "model/data").unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints of the run are damaged"):
        find_start(config)


def test_a_run_of_another_stage_or_model(tmp_path: Path) -> None:
    config = run(tmp_path)
    own(config, 10)
    other = load_config("tiny_stage3", ["--run_dir", config.run_dir])
    with pytest.raises(CheckpointError, match="expected training of stage3, found training of stage2"):
        find_start(other)
    wider = run(tmp_path, "--model.decoder.hidden", "256")
    with pytest.raises(CheckpointError, match="another model: decoder.hidden: expected 256, found 128"):
        find_start(wider)


def test_given_weights_must_fit(tmp_path: Path) -> None:
    config = run(tmp_path, "--checkpoint.init_from", str(tmp_path / "weights"))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        find_start(config)
    given = checkpoint(tmp_path / "weights", config.model, "stage1", start_of="stage2")
    assert find_start(config).checkpoint == given
    stage3 = ["--run_dir", str(tmp_path / "other"), "--checkpoint.init_from", str(given)]
    with pytest.raises(CheckpointError, match="made to start stage2, but this run is stage3"):
        find_start(load_config("tiny_stage3", stage3))
