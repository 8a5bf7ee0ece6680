"""One owner of a run directory: a second job on it is refused, and the directory of a dead one is taken over.

To own a run is to have created the file of the next number in `RUN/owner` (see `owner_entries`), which only one process
can: it is a hard link to a complete file, which is exclusive on NFS, too. No file is ever renamed or removed to take a
run over, so that only one of several starts wins, and an owner that was stalled finds a higher number, or its own file
gone, before it writes again.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.writing import replace_bytes
from megatron_qwenvl.runtime.identity import ProcessIdentity
from megatron_qwenvl.runtime.retry import retry_read

from .heartbeat import Heartbeat
from .owner_entries import (
    OwnerEntry,
    beat_path,
    create_entry,
    encode_entry,
    entry_path,
    number_of,
    read_entry,
    read_newest,
)
from .ranks import Ranks
from .takeover import Takeover

logger = logging.getLogger(__name__)


class OwnershipLost(CheckpointError):
    """Another start has taken the run over: this one must not write any more."""


@dataclass(frozen=True)
class Hold:
    """This start's hold on the run, for any rank to check."""

    folder: Path
    """The run's `owner` folder."""
    number: int
    """Number of this start's entry."""
    token: str
    """Its token."""

    def check(self) -> None:
        """Make sure that the run is still this start's; to be called before every write to its directory.

        Raises:
            OwnershipLost: it is not.
            OSError: the folder cannot be read, or is away with its file system.
        """
        newest = read_newest(self.folder)
        if newest is None:  # a start that takes the run over leaves a file
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
    """Waits until a run directory has no owner, takes it for this start, and keeps it.

    Args:
        run_dir: the run's directory.
        patience: seconds without a beat after which an owner is dead of which nothing else can be found out.
        identity: the calling process, unless given.
    """

    def __init__(self, run_dir: Path, patience: float, identity: ProcessIdentity | None = None) -> None:
        self._run_dir = run_dir
        self._folder = run_dir / "owner"
        self._patience = patience
        self._me = identity or ProcessIdentity.of_this_process()
        self._takeover = Takeover(self._folder, self._me, patience)
        self._last: OwnerEntry | None = None
        self._hold: Hold | None = None
        self._heartbeat: Heartbeat | None = None

    def wait_until_free(self) -> None:
        """Wait until it is known that the run has no owner; changes nothing.

        Raises:
            CheckpointError: it has one.
            OSError: the folder cannot be read.
        """
        while (entry := read_newest(self._folder)) is not None and entry.released is None:
            if self._takeover.is_dead(entry):
                logger.warning("the run's last owner, %s, is dead: taking over", entry.process)
                break
        self._last = entry

    def refuse_if_owned(self) -> None:
        """Raise if the run certainly has an owner; unlike `wait_until_free`, does not wait for signs of life.

        Raises:
            CheckpointError: it has one.
        """
        entry = read_newest(self._folder)
        if entry is not None and not entry.released and self._takeover.known_alive(entry):
            raise self._takeover.refusal(entry)

    def take(self) -> Hold:
        """Become the owner after `wait_until_free`, unless another start has become it since.

        Raises:
            CheckpointError: another start has.
            OSError: the file system refuses.
        """
        number = self._last.number + 1 if self._last else 1
        entry = OwnerEntry(number, uuid4().hex, self._me, time.strftime("%F %T %z"))
        self._folder.mkdir(parents=True, exist_ok=True)
        if not create_entry(self._folder, entry) or self._is_passed(entry):
            self.refuse_if_owned()
            raise CheckpointError(
                f"run_dir {self._run_dir}: another start of this run came in between: start again to go on from there"
            )
        beat = beat_path(self._folder, number)
        beat.touch()
        hold = self._hold = Hold(self._folder, number, entry.token)
        self._remove_older(number)
        self._heartbeat = Heartbeat(beat, self._patience, hold.is_lost)
        return hold

    def release(self) -> None:
        """Record that the run has no owner any more; does nothing if this start does not own it."""
        if self._heartbeat:
            self._heartbeat.stop()
        hold, self._hold = self._hold, None
        if hold is None or hold.is_lost():
            return
        with suppress(OSError):  # the next start finds this process dead
            path = entry_path(self._folder, hold.number)
            released = replace(read_entry(path), released=time.strftime("%F %T %z"))
            replace_bytes(path, encode_entry(released))

    def _is_passed(self, entry: OwnerEntry) -> bool:
        """Whether there is a higher number already."""
        newest = retry_read(self._folder, lambda: read_newest(self._folder))
        return newest is not None and newest.number > entry.number

    def _remove_older(self, number: int) -> None:
        for path in retry_read(self._folder, lambda: list(self._folder.iterdir())):
            if (found := number_of(path)) is not None and found < number:
                path.unlink(missing_ok=True)


@contextmanager
def refused_if_owned(owner: RunOwner, ranks: Ranks) -> Iterator[None]:
    """Turn an error inside into a refusal if another start owns the run, whose changes of files may have caused it."""
    try:
        yield
    except Exception:
        if ranks.is_rank0:
            owner.refuse_if_owned()
        raise


@contextmanager
def released_on_error(owner: RunOwner) -> Iterator[None]:
    """Release the run if what follows `take` fails."""
    try:
        yield
    except BaseException:
        owner.release()
        raise


def take_together(owner: RunOwner, ranks: Ranks) -> Hold:
    """Let rank 0 take the run, for all ranks. Collective.

    Raises:
        CheckpointError: on every rank, if rank 0 cannot become the owner.
    """
    return ranks.broadcast(ranks.run_on_rank0(owner.take, "refused"))
