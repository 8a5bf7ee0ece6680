"""Start and stop of the parallel engine: device, process groups, megatron-core's parallel state, kernels.

Relies on `parallel_state` making all process groups, on `ProcessGroupCollection.use_mpu_process_groups` handing them
out by name (`tp`, `pp`, `dp`, `mp`), on the random states that `model_parallel_cuda_manual_seed` adds to its
tracker, and on the texts with which gloo reports that another process is gone. Held by
`tests/unit/engine/test_start.py`.
"""

from __future__ import annotations

import logging
import platform
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.runtime.devices import choose_device
from megatron_qwenvl.runtime.processes import ProcessInfo, detect_process
from megatron_qwenvl.runtime.retry import retry_read
from megatron_qwenvl.runtime.temporary_directory import choose_temporary_directory

from . import adamw
from .backends import LayerBackend, choose_backend
from .cpu_adapter import adapt_engine, restore_engine
from .versions import check_version

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """Processes and devices of a run, from the point of view of one rank; passed explicitly."""

    process: ProcessInfo
    """Place of this process in the run."""
    device: torch.device
    """Device of parameters, activations and gradients."""
    kernels: LayerBackend
    """Chosen kernels."""
    groups: ProcessGroupCollection
    """megatron-core's process groups."""
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int

    @property
    def is_rank0(self) -> bool:
        """Global rank 0: the one that logs and writes what is written once."""
        return self.process.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """The pipeline stage that holds the loss."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def on_gpu(self) -> bool:
        """True on CUDA."""
        return self.device.type == "cuda"

    def all_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place; `values` lives on `device`."""
        dist.all_reduce(values)
        return values

    def model_parallel_max(self, values: torch.Tensor) -> torch.Tensor:
        """Maximum over the ranks of one model replica (tensor x pipeline), in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.groups.mp)
        return values

    def all_max(self, values: Sequence[float]) -> list[float]:
        """Maximum over all ranks of each value."""
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def sum_ranks(self, value: int) -> int:
        """Sum over all ranks of a whole number."""
        return int(self.all_sum(torch.tensor([value], dtype=torch.float64, device=self.device)))

    def any_rank(self, here: bool) -> bool:
        """True on every rank if it is true on any."""
        return self.all_max([float(here)])[0] > 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.on_gpu:
            dist.barrier(device_ids=[self.device.index])
        else:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait for the device's queued work."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        """Largest memory allocated on the device since the last reset (GPU), or resident in this process ever (CPU)."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def reset_peak_memory(self) -> None:
        """Let `peak_memory_bytes` start anew on a GPU; the peak of a CPU process cannot be reset."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def device_name(self) -> str:
        """Name of the device's model, or the kind of CPU."""
        return torch.cuda.get_device_name(self.device) if self.on_gpu else f"CPU ({platform.machine()})"


def start_engine(config: RunConfig, process: ProcessInfo | None = None) -> Runtime:
    """Join the run: choose the device, create the process groups and megatron-core's parallel state.

    The configuration has been validated against the world size before.

    Raises:
        LaunchError: the environment contradicts itself or has no rendezvous.
        LayerBackendError: the asked-for kernels cannot be used.
        EngineVersionError: CPU run on an untested megatron-core.
    """
    process = process or detect_process()
    if (change := choose_temporary_directory()) and process.rank == 0:
        logger.warning(change)
    retry_read.seconds = config.runtime.retry_seconds
    device = choose_device(config.runtime.device, process.local_rank, process.launcher)
    check_version(on_gpu=device.type == "cuda", log=process.rank == 0)
    kernels = choose_backend(config.runtime.kernels, on_gpu=device.type == "cuda")
    _prepare_device(device, config)
    if kernels.name != "te":
        adamw.install(kernels.name)
    _join_processes(process, device, config)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        distributed_timeout_minutes=max(1, round(config.runtime.timeout_minutes)),
        create_gloo_process_groups=True,  # optimizer state is gathered over them for checkpoints
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
    runtime = Runtime(
        process=process,
        device=device,
        kernels=kernels,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )
    if runtime.is_rank0:
        logger.info("%d process(es) by %s on %s", process.world_size, process.launcher, device.type)
        logger.info(kernels.describe())
    return runtime


def stop_engine() -> None:
    """Leave the run: process groups and parallel state are destroyed, torch and megatron-core as they were. The engine
    can be started again."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    adamw.uninstall()
    restore_engine()


def engine_is_running() -> bool:
    """Return whether this process has joined a run and not left it."""
    return dist.is_initialized()


def is_lost_peer(error: Exception) -> bool:
    """True if the error says that another process of the run is gone, not what went wrong in this one."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def _prepare_device(device: torch.device, config: RunConfig) -> None:
    # Every tensor from a loader worker holds an open file while it lives.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        adapt_engine()
    torch.manual_seed(config.seed)


def _join_processes(process: ProcessInfo, device: torch.device, config: RunConfig) -> None:
    if process.world_size == 1 and not process.init_method:
        store: dist.Store | None = dist.HashStore()
        init_method = None
    else:
        store, init_method = None, process.init_method
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        init_method=init_method,
        store=store,
        rank=process.rank,
        world_size=process.world_size,
        timeout=timedelta(minutes=config.runtime.timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )
