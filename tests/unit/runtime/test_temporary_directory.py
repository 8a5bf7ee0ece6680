"""Where temporary files go when TMPDIR cannot be used."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path

import pytest

from megatron_qwenvl.runtime import temporary_directory
from megatron_qwenvl.runtime.processes import LaunchError
from megatron_qwenvl.runtime.temporary_directory import choose_temporary_directory


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not asked for its temporary directory yet."""
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.mark.parametrize("kind", ["missing", "a file", "long"])
def test_an_unusable_directory_is_replaced_and_told_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / ("x" * 100 if kind == "long" else "place")
    if kind == "long":
        place.mkdir()
    elif kind == "a file":
        place.write_text("")
    monkeypatch.setenv("TMPDIR", str(place))
    told = choose_temporary_directory()
    assert told is not None and str(place) in told and "\n" not in told
    assert ("too long" if kind == "long" else "cannot be used") in told
    assert choose_temporary_directory() is None
    assert os.environ["TMPDIR"] == tempfile.gettempdir() != str(place)
    with multiprocessing.connection.Listener(family="AF_UNIX") as listener:  # type: ignore[attr-defined]
        assert not str(listener.address).startswith(str(place))


def test_a_usable_directory_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(short))
    tempfile.tempdir = None
    assert choose_temporary_directory() is None
    assert tempfile.gettempdir() == str(short)
    short.rmdir()


def test_no_directory_at_all_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(temporary_directory, "_SHORT_PLACES", (str(tmp_path / "none"),))
    with pytest.raises(LaunchError, match="too long .* no temporary directory can be written to"):
        choose_temporary_directory()
