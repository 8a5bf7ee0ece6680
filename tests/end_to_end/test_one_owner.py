"""A run that loses its directory to another start ends on every rank and writes nothing more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_qwenvl.checkpoint.run.owner import RunOwner
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.runtime.identity import ProcessIdentity
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.loop import Trainer
from tests.distributed.harness import run_ranks

from .test_refused_starts import tree
from .training_cases import records, run_config, train, write_data

LOST_AFTER = 3


def lose_the_run(process: ProcessInfo, config: Any) -> tuple[str, bool]:
    """Train until another start takes over; the error, and whether the directory changed after that."""
    runtime = start_engine(config, process)
    trainer = Trainer.build(config, runtime)
    run, before = Path(config.run_dir), {}
    train_step = trainer._train

    def stalled(*arguments: Any) -> Any:
        if trainer.progress.step == LOST_AFTER and runtime.is_rank0:
            me = ProcessIdentity.of_this_process({})
            trainer.owner.release()  # stands for a time without a beat
            taker = RunOwner(run, 1000, replace(me, host="node17", boot_id="x"))
            taker.wait_until_free()
            taker.take()
            assert taker._heartbeat is not None
            taker._heartbeat.stop()
            before.update(tree(run))
        return train_step(*arguments)

    trainer._train = stalled  # type: ignore[method-assign]
    try:
        trainer.run()
    except CheckpointError as error:
        changed = [name for name, found in tree(run).items() if found != before.get(name)]
        # The thread of a background save was not stalled here, and may have been in the middle of its files.
        tmp_dir = "checkpoints/step_00000002.tmp" if config.checkpoint.asynchronous else "nothing"
        wrote = [name for name in changed if not name.endswith(".beat") and not name.startswith(tmp_dir)]
        return str(error), runtime.is_rank0 and bool(wrote)
    return "not ended", True


@pytest.mark.parametrize(
    "overrides", [(), ("--logging.interval", "100"), ("--checkpoint.asynchronous", "true")]
)
def test_a_stalled_run_that_was_taken_over_ends_before_it_writes_again(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    write_data(tmp_path)
    settings = ("--checkpoint.interval", "2", "--checkpoint.on_failure", "continue", *overrides)
    config = run_config(tmp_path, tmp_path / "run", *settings, world=2)
    for error, changed in run_ranks(2, lose_the_run, config):
        assert "taken over" in error and "node17" in error
        assert not changed


def test_a_run_releases_its_directory_at_its_end(tmp_path: Path) -> None:
    write_data(tmp_path)
    run = tmp_path / "run"
    for steps in ("3", "4"):
        run_ranks(1, train, run_config(tmp_path, run, "--train.steps", steps))
    assert [record["step"] for record in records(run)] == [0, 1, 2, 3]
    assert '"released": "2' in (run / "owner/00000002.json").read_text()
