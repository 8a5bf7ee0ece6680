"""Exchange of JSON values between ranks over the rendezvous store, before there is a process group.

With a missing or broken rank, a process group hangs or fails on every rank in the same way. The store shows which ranks
have connected.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_qwenvl.runtime.processes import ProcessInfo

_POLL_SECONDS = 0.05


class RendezvousError(RuntimeError):
    """The rendezvous cannot be reached or opened, or rank 0 has not answered."""


_CLOSED = "closed"


def open_store(process: ProcessInfo, seconds: float, host: bool) -> dist.Store:
    """Open a new connection to the run's store.

    Args:
        process: rank of this process; `init_method` is the address of the store.
        seconds: time limit of the connection.
        host: let rank 0 open the store that the others connect to. torchrun opens one itself.

    Raises:
        RendezvousError: it cannot be reached in time; on rank 0: it cannot be opened.
    """
    scheme, _, place = process.init_method.partition("://")
    if scheme == "file":
        return dist.FileStore(place, -1)  # with a number of users, the last one would remove the file
    if scheme != "tcp":
        return dist.HashStore()
    address, _, port = place.rpartition(":")
    address = address.removeprefix("[").removesuffix("]")  # of an IPv6 address in a URL
    hosts = host and process.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(
            address, int(port), None, hosts, timedelta(seconds=seconds), wait_for_workers=False
        )
    except (dist.DistError, ValueError, TimeoutError) as error:
        what = "cannot be opened" if hosts else f"does not answer within {seconds:.0f} s"
        raise RendezvousError(
            f"rank {process.rank}: the rendezvous of rank 0 at {process.init_method} {what} ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].strip()[:200] if str(error) else type(error).__name__


class Exchange:
    """Channel from all ranks to rank 0 and from rank 0 to all ranks.

    Args:
        process: rank and rendezvous of this process.
        seconds: time limit of the connection to the store.

    Raises:
        RendezvousError: see `open_store`.
    """

    def __init__(self, process: ProcessInfo, seconds: float) -> None:
        self.process = process
        # A prefix per attempt: torchrun's store, and that of a restarted run, hold other keys too.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"preflight/{attempt}", open_store(process, seconds, host=True))

    def send(self, topic: str, value: Any) -> None:
        """Send this rank's value of a topic to rank 0.

        Raises:
            RendezvousError: rank 0 has ended.
        """
        try:
            self._store.set(f"{topic}/{self.process.rank}", json.dumps(value))
        except dist.DistNetworkError as error:
            raise self._broken(error) from error

    def gather(self, topic: str, seconds: float) -> dict[int, Any]:
        """Wait, on rank 0, for the values of all ranks; returns those that were sent within the time."""
        keys = {rank: f"{topic}/{rank}" for rank in range(self.process.world_size)}
        self._wait(list(keys.values()), seconds)
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._has(key)}

    def broadcast(self, topic: str, value: Any) -> None:
        """Send, on rank 0, a value to all ranks."""
        self._store.set(topic, json.dumps(value))

    def receive(self, topic: str, seconds: float) -> Any:
        """Receive a value that rank 0 broadcasts.

        Raises:
            RendezvousError: nothing was received within the time, or rank 0 has ended.
        """
        if not self._wait([topic], seconds):
            raise RendezvousError(
                f"rank {self.process.rank}: rank 0 has not answered ({topic}) within {seconds:.0f} s"
            )
        return json.loads(self._store.get(topic))

    def close(self, ranks: Iterable[int], seconds: float) -> None:
        """End the exchange; rank 0 keeps the store open until `ranks` have closed theirs, or the time is over."""
        try:
            self.send(_CLOSED, True)
            if self.process.rank == 0:
                self._wait([f"{_CLOSED}/{rank}" for rank in ranks], seconds)
        except RendezvousError:
            return  # rank 0 has ended before

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _wait(self, keys: Sequence[str], seconds: float) -> bool:
        """Wait for the keys; False if the time runs out first."""
        end = time.monotonic() + seconds
        try:
            while not self._store.check(list(keys)):
                if time.monotonic() > end:
                    return False
                time.sleep(_POLL_SECONDS)
        except dist.DistNetworkError as error:
            raise self._broken(error) from error
        return True

    def _broken(self, error: Exception) -> RendezvousError:
        return RendezvousError(
            f"rank {self.process.rank}: the connection to rank 0 broke ({_first_line(error)})"
        )
