"""Measurements on every rank before a run: its device, the run directory and the network.

Each probe returns a typed report, which is sent to rank 0 as JSON and assessed there (`verdict`).
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
"""Side of the matrices of the test product: about 1 ms on a data-center GPU, a few ms on a CPU core."""
MESSAGE_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
"""Bytes of the all-reduce and of the messages between nodes."""
_REPEATS = 5
_COMPUTE_SECONDS = 0.3
"""Duration of the repetitions: long enough for one undisturbed product when processes share cores."""
_POLL_SECONDS = 0.1
_T = TypeVar("_T")


class ProbeTimeoutError(RuntimeError):
    """A probe did not finish in time."""


def run_with_timeout(seconds: float, action: Callable[[], _T]) -> _T:
    """Run `action` in a thread, wait for it and return its result.

    Raises:
        ProbeTimeoutError: it did not finish. Its thread continues: a hung file system or network cannot be interrupted.
        Exception: the exception of the action.
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
        raise ProbeTimeoutError(f"not finished within {seconds:.0f} s")
    return result[0]


def describe_error(error: BaseException) -> str:
    """Describe an error in one line."""
    if isinstance(error, (LaunchError, LayerBackendError, ProbeTimeoutError)):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:200] if first else ''}".rstrip(": ")


@dataclass(frozen=True)
class MachineReport:
    """Device of one rank and the result of its test."""

    device: str = ""
    """Kind of device: cuda or cpu."""
    gpu: str = ""
    """Model of the GPU."""
    gpu_identity: str = ""
    """UUID of the GPU."""
    free_bytes: int = 0
    """Free memory of the GPU before the first allocation."""
    total_bytes: int = 0
    """Total memory of the GPU."""
    kernels: str = ""
    """Kernels that the run would use here, with the reason if better ones are not available."""
    seconds: float = 0.0
    """Time of the fastest matrix product."""
    wrong: int = 0
    """Number of wrong elements of the product."""
    device_problem: str = ""
    kernel_problem: str = ""
    compute_problem: str = ""


def probe_machine(process: ProcessInfo, settings: RuntimeConfig) -> MachineReport:
    """Choose device and kernels as the run would, and compute a matrix product whose result is known."""
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
    """Time the product of a Hadamard matrix and its transpose, and count its wrong elements.

    The exact result is known, in bf16 too: the side of the matrix on the diagonal and zero elsewhere.

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
    """Build Sylvester's matrix of +1 and -1 with orthogonal rows, `[side, side]`; `side` is a power of two."""
    matrix = torch.ones(1, 1, device=device, dtype=dtype)
    while len(matrix) < side:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@dataclass(frozen=True)
class DirectoryReport:
    """Run directory and required files, as one rank finds them."""

    problem: str = ""
    """Reason why the rank's file could not be written."""
    missing: tuple[str, ...] = ()
    """Required paths that do not exist here."""
    free_bytes: int = 0
    """Free bytes of the file system of the run directory."""


def probe_directory(run_dir: Path, token: str) -> Path:
    """Directory for the ranks' test files, inside the run directory."""
    return run_dir / f".preflight-{token}"


def write_own_file(run_dir: Path, token: str, rank: int, paths: Sequence[Path]) -> DirectoryReport:
    """Write and fsync this rank's file, and check that `paths` exist."""
    missing = tuple(str(path) for path in paths if not os.path.exists(path))
    folder = probe_directory(run_dir, token)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank-{rank}", "w") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
        return DirectoryReport("", missing, shutil.disk_usage(run_dir).free)
    except OSError as error:
        return DirectoryReport(f"{run_dir} cannot be written: {describe_error(error)}", missing)


def find_files(run_dir: Path, token: str, ranks: Sequence[int], seconds: float) -> list[int]:
    """Find the ranks whose files are visible here; repeated for `seconds`, because NFS caches directories."""
    folder, end = probe_directory(run_dir, token), time.monotonic() + seconds
    while True:
        seen = [rank for rank in ranks if _holds(folder / f"rank-{rank}", token)]
        if len(seen) == len(ranks) or time.monotonic() > end:
            return seen
        time.sleep(_POLL_SECONDS)
        os.listdir(folder)  # refreshes the cache from the server


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def remove_files(run_dir: Path, token: str, rank: int) -> None:
    """Remove this rank's file; the last rank on a file system removes the folder."""
    folder = probe_directory(run_dir, token)
    try:
        (folder / f"rank-{rank}").unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        return  # not empty yet, or gone


@dataclass
class NetworkReport:
    """Network as one rank finds it; filled in during the probe, so that it shows where a rank got stuck."""

    doing: str = "joining the process group"
    """Current operation."""
    phase: int = 0
    """Number of the current operation: 0 joining, then each round of links, then the all-reduce."""
    link_seconds: dict[str, float] = field(default_factory=dict)
    """Round-trip time of the fastest message to another node, by node."""
    seconds: float = 0.0
    """Time of the fastest all-reduce."""
    wrong: int = 0
    """Number of wrong elements of the sum."""
    problem: str = ""
    """Description of a failure; empty without one."""


@dataclass(frozen=True)
class NetworkPlan:
    """Plan of the network test: pairs of nodes that exchange messages, round by round."""

    seconds: float
    """Time limit of the whole test."""
    rounds: list[list[tuple[str, str]]]
    """Pairs of nodes, by round."""
    leaders: dict[str, int]
    """Rank that sends and receives for a node."""


def probe_network(
    process: ProcessInfo,
    device: torch.device,
    store: dist.Store,
    plan: NetworkPlan,
    report: NetworkReport,
) -> None:
    """Join a process group as the run would, measure the links between nodes, then an all-reduce of all ranks.

    Args:
        process: rank of this process.
        device: device of the tensors; selects NCCL or gloo.
        store: a separate connection to the run's store.
        plan: links to measure.
        report: filled in during the test.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("preflight-group", store),
        rank=process.rank,
        world_size=process.world_size,
        timeout=timedelta(seconds=plan.seconds + 10),  # `run_with_timeout` expires first
        device_id=device if device.type == "cuda" else None,
    )
    message = torch.zeros(MESSAGE_BYTES[device.type] // 4, device=device)
    for number, pairs in enumerate(plan.rounds):
        report.phase = 1 + number
        for node, other in pairs:
            _measure_link(process.rank, plan.leaders, node, other, message, report)
    report.phase, report.doing = 1 + len(plan.rounds), "all-reduce"
    report.seconds, report.wrong = _all_reduce(process, message)
    dist.destroy_process_group()


def _measure_link(
    rank: int, leaders: dict[str, int], node: str, other: str, message: torch.Tensor, report: NetworkReport
) -> None:
    first, second = leaders[node], leaders[other]
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
    """Time all-reduces of rank + 1; returns the seconds of the fastest one and the number of wrong elements."""
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
