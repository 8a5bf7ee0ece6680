"""One owner of a run directory: a second job on it is refused, and the directory of a dead one is taken over.

    RUN/owner/
        00000007.json  who owns the run: the highest number does, until the file says when it was released
        00000007.beat  a counter that the owner raises while it lives

To own a run is to have made the file of the next number, which only one process can (a hard link to a file that is
complete, exclusive on NFS too). Nothing is ever renamed or removed to take a run over, so that of any number of takers
one wins, and an owner that was stalled finds a higher number, or its own file gone, before it writes again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.json_text import parse_json
from megatron_qwenvl.checkpoint.storage.writing import replace_bytes
from megatron_qwenvl.runtime.identity import ProcessIdentity
from megatron_qwenvl.runtime.retry import reads
from megatron_qwenvl.runtime.slurm import is_job_over

from .ranks import Ranks

logger = logging.getLogger(__name__)

BEATS_PER_PATIENCE = 8
"""The owner raises its counter so often within the time after which it would be taken for dead."""
LONGEST_BEAT_SECONDS = 10.0
_SLURM_SECONDS = 30.0
"""Between two questions to Slurm while a start waits."""
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}


class OwnershipLost(CheckpointError):
    """Another start has taken the run over: this one may write nothing any more."""


@dataclass(frozen=True)
class _Entry:
    """One file of the folder."""

    number: int
    token: str
    """Of this start alone."""
    process: ProcessIdentity | None
    """Who made it; None: the file is damaged."""
    since: str = "an unknown time"
    released: str | None = None
    """When the owner ended; None: it has not, or not by itself."""


@dataclass(frozen=True)
class Hold:
    """This start's hold on the run, for any rank to check."""

    folder: Path
    number: int
    token: str

    def check(self) -> None:
        """Make sure that the run is still this start's; to be called before every write to its directory.

        Raises:
            OwnershipLost: it is not.
            OSError: the folder cannot be read, or is away with its file system.
        """
        newest = _newest(self.folder)
        if newest is None:  # who takes a run over leaves a file
            raise OSError(errno.ESTALE, "the files of the run's owner are away", str(self.folder))
        if newest.number == self.number and newest.token == self.token:
            if newest.released is None:
                return
            raise OwnershipLost(f"{self.folder.parent}: this start has given the run up at {newest.released}")
        by = newest.process if newest.process else "an unknown process"
        raise OwnershipLost(
            f"{self.folder.parent}: this start was stalled and the run was taken over by {by}; it ends without writing"
        )

    def is_lost(self) -> bool:
        """Whether another start has taken the run over, as far as the file system answers."""
        try:
            self.check()
        except OwnershipLost:
            return True
        except OSError:
            pass
        return False


class RunOwner:
    """Judges who owns a run directory, takes it for this start, and keeps it.

    Args:
        run_dir: the run's directory.
        patience: seconds without a beat after which an owner of which nothing else can be found out is dead.
        identity: the calling process, unless given.
    """

    def __init__(self, run_dir: Path, patience: float, identity: ProcessIdentity | None = None) -> None:
        self._run_dir = run_dir
        self._folder = run_dir / "owner"
        self._patience = patience
        self._me = identity or ProcessIdentity.of_this_process()
        self._judged: _Entry | None = None
        self._hold: Hold | None = None
        self._stopped = threading.Event()

    def wait_until_free(self) -> None:
        """Wait until it is known that nobody owns the run; changes nothing.

        Raises:
            CheckpointError: somebody does.
            OSError: the folder cannot be read.
        """
        while (entry := _newest(self._folder)) is not None and entry.released is None:
            if self._is_dead(entry):
                logger.warning("the run's last owner, %s, is dead: taking over", entry.process)
                break
        self._judged = entry

    def refuse_if_owned(self) -> None:
        """As `wait_until_free`, but without waiting: an owner that may be dead is none.

        Raises:
            CheckpointError: somebody certainly owns the run.
        """
        entry = _newest(self._folder)
        known = None if entry is None or entry.released else self._known_alive(entry)
        if entry is not None and known:
            raise self._refusal(entry)

    def take(self) -> Hold:
        """Become the owner after `wait_until_free`, unless somebody else became it since.

        Raises:
            CheckpointError: somebody did.
            OSError: the file system refuses.
        """
        number = self._judged.number + 1 if self._judged else 1
        entry = _Entry(number, uuid4().hex, self._me, time.strftime("%F %T %z"))
        self._folder.mkdir(parents=True, exist_ok=True)
        if not _create(_path(self._folder, number), _to_bytes(entry)) or self._is_passed(entry):
            self.refuse_if_owned()
            raise CheckpointError(
                f"run_dir {self._run_dir}: another start of this run came in between: start again to go on from there"
            )
        _beat_path(self._folder, number).touch()
        self._hold = Hold(self._folder, number, entry.token)
        self._remove_older(number)
        threading.Thread(target=self._beat, args=(self._hold,), name="owner", daemon=True).start()
        return self._hold

    def release(self) -> None:
        """Say that the run has no owner any more; does nothing if this start does not own it."""
        self._stopped.set()
        hold, self._hold = self._hold, None
        if hold is None or hold.is_lost():
            return
        with suppress(OSError):  # whoever comes next finds this process dead
            entry = _read(_path(self._folder, hold.number))
            replace_bytes(
                _path(self._folder, hold.number),
                _to_bytes(replace(entry, released=time.strftime("%F %T %z"))),
            )

    def _is_passed(self, entry: _Entry) -> bool:
        """Whether a higher number is there already."""
        newest = reads(self._folder, lambda: _newest(self._folder))
        return newest is not None and newest.number > entry.number

    def _remove_older(self, number: int) -> None:
        for path in reads(self._folder, lambda: list(self._folder.iterdir())):
            if (found := _number(path)) is not None and found < number:
                path.unlink(missing_ok=True)

    def _beat(self, hold: Hold) -> None:
        """Raise the counter until the end, or until there is nothing to raise; never makes the file anew."""
        count, seconds = 0, min(LONGEST_BEAT_SECONDS, self._patience / BEATS_PER_PATIENCE)
        while True:
            count += 1
            try:
                descriptor = os.open(_beat_path(hold.folder, hold.number), os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(descriptor, b"%020d\n" % count)
                finally:
                    os.close(descriptor)  # NFS writes now
            except FileNotFoundError:
                if hold.is_lost():
                    return
            except OSError:
                pass  # the file system is away; so it is for those who wait
            if self._stopped.wait(seconds):
                return

    def _is_dead(self, entry: _Entry) -> bool:
        """Whether an owner is dead; False if it has changed meanwhile.

        Raises:
            CheckpointError: it lives.
        """
        known = self._known_alive(entry)
        if known is None:
            known = self._watch(entry)
        if known:
            raise self._refusal(entry)
        return _newest(self._folder) == entry

    def _known_alive(self, entry: _Entry) -> bool | None:
        if entry.process is None:
            return None
        if entry.process == self._me:  # an earlier run of this very process
            return False
        return entry.process.is_alive(self._me)

    def _watch(self, entry: _Entry) -> bool:
        """Whether an owner elsewhere lives: by Slurm, or by its beat, timed with this process's clock.

        Raises:
            CheckpointError: its job is Slurm's, and Slurm does not answer.
        """
        asks_slurm = self._asks_slurm(entry)
        began, beat, asked = time.monotonic(), self._read_beat(entry), float("-inf")
        logger.info(
            "the run's last owner, %s, may be alive: waiting up to %.0f s for a sign of life",
            entry.process or "an unknown process",
            self._patience,
        )
        while True:
            if asks_slurm and time.monotonic() - asked > _SLURM_SECONDS:
                assert entry.process is not None and entry.process.job is not None
                if (over := is_job_over(entry.process.job)) is not None:
                    return not over
                asked = time.monotonic()
            if self._read_beat(entry) != beat:
                return True
            if _newest(self._folder) != entry:
                return False
            if time.monotonic() - began > self._patience:
                break
            time.sleep(min(1.0, self._patience / BEATS_PER_PATIENCE))
        if asks_slurm:
            raise CheckpointError(
                f"{self._refusal(entry)}; it shows no sign of life, but Slurm does not say whether its job is over: "
                "start again when squeue answers"
            )
        return False

    def _asks_slurm(self, entry: _Entry) -> bool:
        """Slurm knows of another job that has ended; of this one it says only that it runs."""
        job = entry.process.job if entry.process else None
        return job is not None and job != self._me.job and shutil.which("squeue") is not None

    def _read_beat(self, entry: _Entry) -> bytes:
        with suppress(OSError):
            return _beat_path(self._folder, entry.number).read_bytes()
        return b""

    def _refusal(self, entry: _Entry) -> CheckpointError:
        process = entry.process
        who = str(process) if process else "an unknown process"
        stop = "stop it"
        if process:
            stop = f"scancel {process.job}" if process.job else f"kill {process.pid} on {process.host}"
        return CheckpointError(
            f"run_dir {self._run_dir} is already in use by {who} since {entry.since}: wait for its end, stop it "
            f"({stop}), or choose another run_dir"
        )


@contextmanager
def refused_if_owned(owner: RunOwner, ranks: Ranks) -> Iterator[None]:
    """What goes wrong inside because another start owns the run and changes its files is told as that."""
    try:
        yield
    except Exception:
        if ranks.is_rank0:
            owner.refuse_if_owned()
        raise


@contextmanager
def released_on_error(owner: RunOwner) -> Iterator[None]:
    """What follows `take` and fails leaves the run free."""
    try:
        yield
    except BaseException:
        owner.release()
        raise


def take_together(owner: RunOwner, ranks: Ranks) -> Hold:
    """Rank 0's `take`, on all ranks. Collective.

    Raises:
        CheckpointError: on every rank, if rank 0 cannot become the owner.
    """
    return ranks.broadcast(ranks.run_on_rank0(owner.take, "refused"))


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.json"


def _beat_path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.beat"


def _number(path: Path) -> int | None:
    return int(path.stem) if path.stem.isdigit() and path.suffix in (".json", ".beat") else None


def _newest(folder: Path) -> _Entry | None:
    """The entry of the highest number; None if there is none.

    Raises:
        OSError: the folder cannot be read.
    """
    while True:
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return None
        numbers = [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()]
        if not numbers:
            return None
        with suppress(FileNotFoundError):  # a newer owner has removed it
            return _read(_path(folder, max(numbers)))


def _read(path: Path) -> _Entry:
    """One entry; a damaged one is by nobody who is known."""
    content = path.read_bytes()
    try:
        found: dict[str, Any] = parse_json(content)
        process = ProcessIdentity(**found.pop("process"))
        return _Entry(**{**found, "process": process})
    except (ValueError, TypeError, KeyError, AttributeError):
        return _Entry(int(path.stem), f"damaged: {content[:64]!r}", None)


def _to_bytes(entry: _Entry) -> bytes:
    return (json.dumps(asdict(entry), indent=1) + "\n").encode()


def _create(path: Path, content: bytes) -> bool:
    """Make a file with its whole content; False if it is there already."""
    tmp_file = path.with_name(f".{uuid4().hex}")
    try:
        _write(tmp_file, content)
        try:
            os.link(tmp_file, path)
        except FileExistsError:
            return False
        except OSError as error:
            if os.stat(tmp_file).st_nlink == 2:  # NFS: done, but the answer was lost
                return True
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_links(path, content)
    finally:
        tmp_file.unlink(missing_ok=True)
    return True


def _create_without_links(path: Path, content: bytes) -> bool:
    try:
        _write(path, content)
    except FileExistsError:
        return False
    return True


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
