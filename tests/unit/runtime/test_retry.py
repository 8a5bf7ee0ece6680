"""What is read again, for how long, and what is final at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_qwenvl.config.load import ConfigError, load_config
from megatron_qwenvl.runtime import retry
from megatron_qwenvl.runtime.retry import RetriedReads, read_at


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_SECONDS", 0.001)
    monkeypatch.setattr(retry, "LONGEST_SECONDS", 0.002)


class Refusing:
    """A read that fails some times."""

    def __init__(self, number: int, times: int) -> None:
        self.number, self.times, self.calls = number, times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise OSError(self.number, os.strerror(self.number), "file")
        return "content"


@pytest.mark.parametrize(
    "name",
    "EIO ESTALE ETIMEDOUT EAGAIN ENOTCONN ESHUTDOWN ECONNRESET EHOSTDOWN ENETUNREACH EREMOTEIO".split(),
)
def test_an_error_that_may_go_away_is_outlasted_and_counted(name: str) -> None:
    reads, read = RetriedReads(), Refusing(getattr(errno, name), 3)
    assert reads(Path("file"), read) == "content"
    (told,) = reads.take()
    assert "file: read after 3 repetitions" in told and os.strerror(read.number) in told
    assert reads.take() == ()


@pytest.mark.parametrize("name", "ENOENT EACCES EPERM EISDIR ENOTDIR ENAMETOOLONG ENOSPC".split())
def test_other_errors_are_final(name: str) -> None:
    read = Refusing(getattr(errno, name), 1)
    with pytest.raises(OSError, match=os.strerror(read.number)):
        RetriedReads()(Path("file"), read)
    assert read.calls == 1


def test_patience_ends() -> None:
    reads, read = RetriedReads(), Refusing(errno.EIO, 10**9)
    reads.seconds = 0.05
    with pytest.raises(OSError, match="Input/output error"):
        reads(Path("file"), read)
    assert read.calls > 2
    reads.seconds = 0
    once = Refusing(errno.EIO, 1)
    with pytest.raises(OSError, match="Input/output error"):
        reads(Path("file"), once)
    assert once.calls == 1


def test_a_missing_file_is_away_while_its_folder_is(tmp_path: Path) -> None:
    """An unmounted file system looks like that."""
    folder, calls = tmp_path / "data", [0]

    def read() -> str:
        calls[0] += 1
        if calls[0] == 3:
            folder.mkdir()
            (folder / "file").write_text("back")
        return (folder / "file").read_text()

    assert RetriedReads()(folder / "file", read, folder=folder) == "back"
    with pytest.raises(FileNotFoundError):
        RetriedReads()(folder / "other", (folder / "other").read_text, folder=folder)


def test_short_reads_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "file", os.pread
    path.write_bytes(bytes(range(100)))
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: real(descriptor, min(size, 7), offset))
    with path.open("rb") as file:
        assert read_at(file.fileno(), 50, 10) == bytes(range(10, 60))
        assert read_at(file.fileno(), 50, 90) == bytes(range(90, 100))


def patience(*overrides: str) -> float:
    return load_config("tiny_stage1", overrides).runtime.retry_seconds / 60


def test_no_hang_verdict_falls_while_a_read_is_repeated() -> None:
    """Patience ends well before the time after which a run without a step counts as hanging."""
    assert patience() == 10
    assert patience("--runtime.hang_minutes", "3") == 2
    assert patience("--runtime.hang_minutes", "0", "--runtime.timeout_minutes", "6") == 4
    assert patience("--runtime.retry_minutes", "14") == 14
    with pytest.raises(
        ConfigError, match=r"retry_minutes: expected less than runtime.hang_minutes \(15\), found 15"
    ):
        patience("--runtime.retry_minutes", "15")
