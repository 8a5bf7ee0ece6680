"""What every rank measures before a run: its device, the run directory, and the network.

Each probe returns a typed report that is sent to rank 0 as JSON; what it means is decided there.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_qwenvl.config.schema import RuntimeConfig
from megatron_qwenvl.engine.backends import LayerBackendError, choose_backend
from megatron_qwenvl.runtime.devices import choose_device
from megatron_qwenvl.runtime.processes import LaunchError, ProcessInfo

MATRIX_SIDE = {"cuda": 8192, "cpu": 512}
"""Side of the matrices whose product is taken: about 1 ms on a data-centre GPU, some ms on a CPU core."""
MESSAGE_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
"""Bytes of the all-reduce and of the messages between nodes."""
_REPEATS = 5
_COMPUTE_SECONDS = 0.3
"""Long enough for one undisturbed product where processes share cores."""
_POLL_SECONDS = 0.1
_T = TypeVar("_T")


class OverdueError(RuntimeError):
    """Something did not finish in its time."""


def within(seconds: float, action: Callable[[], _T]) -> _T:
    """Run `action` in a thread and wait for it.

    Raises:
        OverdueError: it did not finish. Its thread goes on: a hung file system or network cannot be interrupted.
        Exception: what the action raised.
    """
    result: list[_T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(action())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not result:
        raise OverdueError(f"not finished within {seconds:.0f} s")
    return result[0]


def describe_error(error: BaseException) -> str:
    """One line."""
    if isinstance(error, (LaunchError, LayerBackendError, OverdueError)):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:200] if first else ''}".rstrip(": ")


@dataclass(frozen=True)
class MachineReport:
    """The device of one rank and what it can do."""

    device: str = ""
    """Kind of device: cuda or cpu."""
    gpu: str = ""
    """Model of the GPU."""
    gpu_identity: str = ""
    """What tells it from the others."""
    free_bytes: int = 0
    """Free memory of the GPU before anything was put there."""
    total_bytes: int = 0
    """Its whole memory."""
    kernels: str = ""
    """The kernels that the run would use here, and why not better ones."""
    seconds: float = 0.0
    """Fastest of some matrix products."""
    wrong: int = 0
    """Elements of the product that are wrong."""
    device_problem: str = ""
    kernel_problem: str = ""
    compute_problem: str = ""


def probe_machine(process: ProcessInfo, settings: RuntimeConfig) -> MachineReport:
    """Choose device and kernels as the run would, and compute something of which the answer is known."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        device = choose_device(settings.device, process.local_rank, process.launcher)
        found = _describe_gpu(device) if device.type == "cuda" else {}
    except Exception as error:
        return MachineReport(device_problem=describe_error(error))
    report: dict[str, Any] = {"device": device.type, **found}
    try:
        kernels = choose_backend(settings.kernels, on_gpu=device.type == "cuda")
        report["kernels"] = kernels.describe().removeprefix("kernels: ")
    except LayerBackendError as error:
        report["kernel_problem"] = str(error)
    try:
        report["seconds"], report["wrong"] = multiply(device)
    except Exception as error:
        report["compute_problem"] = describe_error(error)
    return MachineReport(**report)


def _describe_gpu(device: torch.device) -> dict[str, Any]:
    torch.cuda.set_device(device)
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "gpu": properties.name,
        "gpu_identity": str(properties.uuid),
        "free_bytes": free,
        "total_bytes": total,
    }


def multiply(device: torch.device) -> tuple[float, int]:
    """Time a product of which every element is known exactly: a Hadamard matrix times its transpose is its side on the
    diagonal and zero elsewhere, in bf16 too, and every element of both factors takes part in every sum.

    Returns:
        Seconds of the fastest product, and the number of wrong elements.
    """
    side = MATRIX_SIDE[device.type]
    matrix = hadamard(side, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    transposed = matrix.t().contiguous()
    product, fastest = matrix @ transposed, float("inf")
    end = time.perf_counter() + _COMPUTE_SECONDS
    while time.perf_counter() < end:
        _synchronize(device)
        began = time.perf_counter()
        torch.mm(matrix, transposed, out=product)
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    product.diagonal().sub_(side)
    return fastest, int((product != 0).sum())  # NaN differs from 0 too


def hadamard(side: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Sylvester's matrix of +1 and -1 with orthogonal rows, `[side, side]`; `side` is a power of two."""
    matrix = torch.ones(1, 1, device=device, dtype=dtype)
    while len(matrix) < side:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@dataclass(frozen=True)
class WriteReport:
    """The file system as one rank finds it."""

    problem: str = ""
    """Why its file could not be written."""
    missing: tuple[str, ...] = ()
    """Paths that should be there and are not."""
    free_bytes: int = 0
    """Free bytes where the run directory is."""


def probe_folder(run_dir: Path, token: str) -> Path:
    """The folder inside the run directory that the ranks write into."""
    return run_dir / f".preflight-{token}"


def write_own_file(run_dir: Path, token: str, rank: int, paths: Sequence[Path]) -> WriteReport:
    """Write this rank's file durably and look for what should be there."""
    missing = tuple(str(path) for path in paths if not os.path.exists(path))
    folder = probe_folder(run_dir, token)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank-{rank}", "w") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
        return WriteReport("", missing, shutil.disk_usage(run_dir).free)
    except OSError as error:
        return WriteReport(f"{run_dir} cannot be written: {describe_error(error)}", missing)


def find_files(run_dir: Path, token: str, ranks: Sequence[int], seconds: float) -> list[int]:
    """The ranks whose files are seen here; looks again for some seconds, as NFS caches directories."""
    folder, end = probe_folder(run_dir, token), time.monotonic() + seconds
    while True:
        seen = [rank for rank in ranks if _holds(folder / f"rank-{rank}", token)]
        if len(seen) == len(ranks) or time.monotonic() > end:
            return seen
        time.sleep(_POLL_SECONDS)
        os.listdir(folder)  # asks the server anew


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def remove_files(run_dir: Path, token: str, rank: int) -> None:
    """Remove this rank's file; the last rank on a file system removes the folder."""
    folder = probe_folder(run_dir, token)
    try:
        (folder / f"rank-{rank}").unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        return  # not empty yet, or gone


@dataclass
class NetworkReport:
    """The network as one rank finds it; filled while the probe goes on, so that it tells where one got stuck."""

    doing: str = "joining the process group"
    """What is going on."""
    stage: int = 0
    """How far that is: 0 joining, then each round of links, then the all-reduce."""
    link_seconds: dict[str, float] = field(default_factory=dict)
    """Time of a message to another node and back, fastest of some, by that node."""
    seconds: float = 0.0
    """Time of the all-reduce, fastest of some."""
    wrong: int = 0
    """Elements of the sum that are wrong."""
    problem: str = ""
    """What went wrong."""


@dataclass(frozen=True)
class Links:
    """The plan of the network's measurement: which nodes exchange messages when."""

    seconds: float
    """Time for all of it."""
    rounds: list[list[tuple[str, str]]]
    """Pairs of nodes, by round."""
    speakers: dict[str, int]
    """The rank that speaks for a node."""


def probe_network(
    process: ProcessInfo,
    device: torch.device,
    store: dist.Store,
    links: Links,
    report: NetworkReport,
) -> None:
    """Join a process group as the run would, measure the links between nodes, then an all-reduce of all ranks.

    Args:
        process: the place of this process.
        device: where the tensors are; chooses NCCL or gloo.
        store: a connection of its own to the run's store.
        links: which links to measure.
        report: filled in.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("preflight-group", store),
        rank=process.rank,
        world_size=process.world_size,
        timeout=timedelta(seconds=links.seconds + 10),  # who waits in `within` speaks first
        device_id=device if device.type == "cuda" else None,
    )
    message = torch.zeros(MESSAGE_BYTES[device.type] // 4, device=device)
    for number, pairs in enumerate(links.rounds):
        report.stage = 1 + number
        for node, other in pairs:
            _measure_link(process.rank, links.speakers, node, other, message, report)
    report.stage, report.doing = 1 + len(links.rounds), "all-reduce"
    report.seconds, report.wrong = _all_reduce(process, message)
    dist.destroy_process_group()


def _measure_link(
    rank: int, speakers: dict[str, int], node: str, other: str, message: torch.Tensor, report: NetworkReport
) -> None:
    first, second = speakers[node], speakers[other]
    if rank not in (first, second):
        return
    report.doing = f"messages between {node} and {other}"
    fastest = float("inf")
    for _ in range(_REPEATS + 1):  # the first one connects
        _synchronize(message.device)
        began = time.perf_counter()
        if rank == first:
            dist.send(message, second)
            dist.recv(message, second)
        else:
            dist.recv(message, first)
            dist.send(message, first)
        _synchronize(message.device)
        fastest = min(fastest, time.perf_counter() - began)
    if rank == first:
        report.link_seconds[other] = fastest


def _all_reduce(process: ProcessInfo, values: torch.Tensor) -> tuple[float, int]:
    """Fastest of some all-reduces of rank + 1, and how many elements of a sum were wrong."""
    expected, fastest, wrong = process.world_size * (process.world_size + 1) / 2, float("inf"), 0
    for _ in range(_REPEATS):
        values.fill_(process.rank + 1)
        _synchronize(values.device)
        began = time.perf_counter()
        dist.all_reduce(values)
        _synchronize(values.device)
        fastest = min(fastest, time.perf_counter() - began)
        wrong = max(wrong, int((values != expected).sum()))
    return fastest, wrong


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
