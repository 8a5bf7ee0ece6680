"""A run directory has one owner: who is judged dead, who wins, and what a stalled owner may still do."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_qwenvl.checkpoint.run import owner_entries
from megatron_qwenvl.checkpoint.run.owner import OwnershipLost, RunOwner
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.runtime.identity import ProcessIdentity
from megatron_qwenvl.runtime.retry import is_transient, retry_read
from tests.faulty_files import FaultyFiles

ME = ProcessIdentity.of_this_process({})
ELSEWHERE = replace(ME, host="node17", boot_id="another", pid=4711)
PATIENCE = 0.4
FORK = multiprocessing.get_context("fork")


def start(run: Path, identity: ProcessIdentity = ME, patience: float = PATIENCE) -> RunOwner:
    """A start that has become the owner."""
    owner = RunOwner(run, patience, identity)
    owner.wait_until_free()
    owner.take()
    return owner


def dead_owner(run: Path, identity: ProcessIdentity) -> None:
    """An owner that has ended without a word."""
    owner = start(run, identity, patience=1000)
    assert owner._heartbeat is not None
    owner._heartbeat.stop()
    for thread in threading.enumerate():
        if thread.name == "owner":
            thread.join()


def refusal(run: Path, identity: ProcessIdentity = ME, patience: float = PATIENCE) -> str:
    """Why a start is refused."""
    with pytest.raises(CheckpointError) as caught:
        start(run, identity, patience)
    return str(caught.value)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


def records(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What only a start changes: an owner that lives raises its beat at any moment."""
    return {name: content for name, content in contents(folder).items() if not name.endswith(".beat")}


@contextmanager
def living_owner(run: Path) -> Iterator[Any]:
    """Another process of this machine that owns the run."""
    ready = FORK.Event()

    def own() -> None:
        start(run, ProcessIdentity.of_this_process({}), patience=1000)
        ready.set()
        time.sleep(600)

    process = FORK.Process(target=own)
    process.start()
    try:
        assert ready.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


def test_a_living_owner_of_this_machine_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    with living_owner(tmp_path) as process:
        before = records(tmp_path / "owner")
        found = refusal(tmp_path)
        assert records(tmp_path / "owner") == before
        for word in (
            "already in use",
            f"process {process.pid} on host {ME.host}",
            "since 2",
            f"kill {process.pid}",
        ):
            assert word in found
        os.kill(process.pid, signal.SIGSTOP)  # a process that stands still lives
        os.waitpid(process.pid, os.WUNTRACED)
        before = contents(tmp_path / "owner")
        assert "already in use" in refusal(tmp_path)
        assert contents(tmp_path / "owner") == before
        process.kill()
        process.join()
        start(tmp_path, patience=1000).release()  # at once: nothing is waited for


@pytest.mark.parametrize(
    ("change", "alive"),
    [
        ({"started": "1"}, False),  # its number was given to another process
        ({"boot_id": "before"}, False),  # the machine was started anew
        ({"boot_id": "before", "host": "localhost"}, None),  # every machine is called that
        ({"pid_namespace": "pid:[1]"}, None),  # a container's numbers say nothing here
        ({"host": "container-1"}, True),  # the same machine by another name
        ({"host": "node17", "boot_id": "x"}, None),
        ({"boot_id": "", "host": ME.host}, None),
        ({}, True),
    ],
)
def test_what_can_be_known_of_a_process(change: dict[str, str], alive: bool | None) -> None:
    assert replace(ME, **change).is_alive(ME) is alive  # type: ignore[arg-type]


def test_a_requeued_job_takes_over_its_own_earlier_attempt_at_once(tmp_path: Path) -> None:
    first = replace(ELSEWHERE, job="17", restarts=0)
    dead_owner(tmp_path, first)
    start(tmp_path, replace(ME, job="17", restarts=1), patience=1000).release()


def test_an_owner_elsewhere_is_taken_over_when_its_beat_stands_still(tmp_path: Path) -> None:
    """The time is the waiter's own: clocks of the files say nothing."""
    dead_owner(tmp_path, ELSEWHERE)
    for path in (tmp_path / "owner").iterdir():
        os.utime(path, (2e9, 2e9))
    began = time.monotonic()
    start(tmp_path).release()
    assert time.monotonic() - began >= PATIENCE


def test_an_owner_elsewhere_that_beats_is_left_alone(tmp_path: Path) -> None:
    owner = start(tmp_path, ELSEWHERE, patience=0.4)
    assert "process 4711 on host node17" in refusal(tmp_path, patience=60)
    owner.release()
    start(tmp_path, patience=1000).release()


@pytest.mark.parametrize(
    ("squeue", "taken"),
    [
        ("echo COMPLETED", True),
        ("echo 'Invalid job id specified' >&2; exit 1", True),
        ("echo RUNNING", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", False),
    ],
)
def test_slurm_says_whether_an_owner_elsewhere_lives(
    squeue: str, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller that does not answer says nothing, however long there is no beat."""
    dead_owner(tmp_path / "run", replace(ELSEWHERE, job="17"))
    client = tmp_path / "squeue"
    client.write_text(f"#!/bin/bash\n{squeue}\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if taken:
        start(tmp_path / "run", patience=1000).release()
    else:
        assert "scancel 17" in refusal(tmp_path / "run")


def test_of_many_simultaneous_starts_exactly_one_wins(tmp_path: Path) -> None:
    """Also where they take over from an owner that is dead."""
    for previous in (None, replace(ME, started="1")):
        run = tmp_path / str(previous is None)
        if previous:
            dead_owner(run, previous)
        ready, done, won = FORK.Barrier(6), FORK.Barrier(6), FORK.Value("i", 0)

        def compete(run: Path = run, ready: Any = ready, done: Any = done, won: Any = won) -> None:
            owner = RunOwner(run, 1000, ProcessIdentity.of_this_process({}))
            owner.wait_until_free()
            ready.wait()
            try:
                owner.take().check()
            except CheckpointError as error:
                assert "in use" in str(error)
            else:
                with won.get_lock():
                    won.value += 1
            done.wait()

        processes = [FORK.Process(target=compete) for _ in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 6
        assert won.value == 1


def test_a_stalled_owner_that_lost_the_run_knows_it_and_leaves_no_trace(tmp_path: Path) -> None:
    stalled = RunOwner(tmp_path, 0.2, ELSEWHERE)
    stalled.wait_until_free()
    hold = stalled.take()
    hold.check()
    (tmp_path / "owner/00000001.beat").unlink()  # stands for a beat that does not come through
    owner = start(tmp_path)
    before = contents(tmp_path / "owner").keys()
    with pytest.raises(OwnershipLost, match=f"taken over by process {ME.pid} on host"):
        hold.check()
    assert hold.is_lost()
    stalled.release()
    time.sleep(0.1)
    assert contents(tmp_path / "owner").keys() == before == {"00000002.json", "00000002.beat"}
    owner.release()
    assert hold.is_lost()


def test_an_owner_whose_directory_is_away_has_not_lost_it(tmp_path: Path) -> None:
    """A file system that is not mounted shows nothing, or an empty directory; a check waits until it is back."""
    owner = RunOwner(tmp_path / "run", 1000, ME)
    owner.wait_until_free()
    hold = owner.take()
    (tmp_path / "run").rename(tmp_path / "away")
    for folder in ("run", "run/owner"):
        with pytest.raises(OSError, match="are away") as away:
            hold.check()
        assert is_transient(away.value) and not hold.is_lost()
        (tmp_path / folder).mkdir()
    with pytest.raises(OSError, match="are away"):
        hold.check()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "away").rename(tmp_path / "run")
    hold.check()
    owner.release()


def test_taking_a_run_outlasts_a_folder_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = RunOwner(tmp_path, 1000, ME)
    owner.wait_until_free()
    with monkeypatch.context() as patch:
        faulty = FaultyFiles(patch, tmp_path, errno.ESTALE, suffix="owner")
        owner.take().check()
    assert faulty.refused["owner"] >= 1
    assert len(retry_read.take()) >= 1
    owner.release()


def test_a_start_that_another_one_overtook_starts_again(tmp_path: Path) -> None:
    """What it has loaded meanwhile may be old."""
    slow = RunOwner(tmp_path, PATIENCE, ME)
    slow.wait_until_free()
    start(tmp_path, replace(ME, started="1")).release()
    with pytest.raises(CheckpointError, match="start again"):
        slow.take()
    slow.wait_until_free()
    slow.take().check()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"number": 1}', b"\xff"])
def test_a_damaged_file_is_an_owner_of_whom_nothing_is_known(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/00000003.json").write_bytes(content)
    began = time.monotonic()
    start(tmp_path).release()
    assert time.monotonic() - began >= PATIENCE
    assert (tmp_path / "owner/00000004.json").exists()


def test_a_file_system_without_hard_links_has_one_winner_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(owner_entries.os, "link", refuse)
    first, second = (
        RunOwner(tmp_path, 1000, replace(ME, host="a")),
        RunOwner(tmp_path, 1000, replace(ME, host="b")),
    )
    first.wait_until_free()
    second.wait_until_free()
    first.take().check()
    with pytest.raises(CheckpointError, match="in use"):
        second.take()
