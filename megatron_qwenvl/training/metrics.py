"""Metrics of a run: a progress line, a JSONL record and TensorBoard scalars per logged step."""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.engine.start import Runtime
from megatron_qwenvl.engine.versions import installed_version
from megatron_qwenvl.model.flops import total_flops
from megatron_qwenvl.runtime.json_lines import RecordFile
from megatron_qwenvl.runtime.peak_flops import dense_bf16_flops

from .step import StepReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepCost:
    """Time and memory of a step."""

    seconds: float
    """Wall time from the request of its data to the end of its update on every rank."""
    data_wait: float
    """Longest time in seconds that a rank waited for its data; the others wait for that rank."""
    peak_memory_bytes: int
    """Largest memory of a rank since the previous record (see `Runtime.peak_memory_bytes`)."""
    repeated_reads: int = 0
    """Repeated reads of all ranks since the previous record."""


def mfu_reference(config: RunConfig, runtime: Runtime) -> float | None:
    """Peak bf16 FLOP/s of this rank's device; None if unknown or if the run does not compute in bf16."""
    return dense_bf16_flops(runtime.device_name()) if config.train.precision == "bf16" else None


def start_record(config: RunConfig, runtime: Runtime, step: int) -> dict[str, Any]:
    """Record of devices and versions at the start of a run; the rates of its step records refer to these devices."""
    return {
        "step": step,
        "device": runtime.device_name(),
        "peak_flops_per_device": mfu_reference(config, runtime),
        "processes": runtime.process.world_size,
        "data_parallel": runtime.data_size,
        "kernels": runtime.kernels.name,
        "torch": torch.__version__,
        "megatron_core": installed_version(),
        "transformer_engine": _version("transformer-engine") if runtime.kernels.name == "te" else None,
        "python": platform.python_version(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # imports all the same, as from a source tree
        return None


def step_metrics(
    config: RunConfig,
    report: StepReport,
    cost: StepCost,
    step: int,
    lr: float,
    devices: int,
    peak_flops: float | None,
) -> dict[str, Any]:
    """Make the record of one step.

    Rates are over all devices unless named `_per_device`; `flops` are model FLOPs of tokens and images without
    padding (see `model.flops`), `mfu` is their rate divided by `peak_flops` per device, if that is known;
    `padding` is the share of decoder positions that are padding; `data_wait` is the longest data wait of a rank as
    a share of the step.
    """
    seconds = cost.seconds
    patches = (config.data.image_size // config.model.vision.patch_size) ** 2
    flops = total_flops(config.model, config.train.frozen, report.workload(patches))
    per_device = flops / seconds / devices
    return {
        "step": step,
        "loss": report.loss,
        **{f"loss/{task}": loss for task, loss in report.task_losses.items()},
        "grad_norm": report.grad_norm,
        "applied": report.applied,
        "not_applied_because": report.not_applied_because,
        "lr": lr,
        "seconds": seconds,
        "samples": report.samples,
        "images": report.images,
        "tokens": report.tokens,
        "padded_tokens": report.padded_tokens,
        "loss_tokens": report.loss_tokens,
        "micro_batches": report.micro_batches,
        "flops": flops,
        "samples_per_second": report.samples / seconds,
        "images_per_second": report.images / seconds,
        "tokens_per_second": report.tokens / seconds,
        "tflops_per_device": per_device / 1e12,
        "mfu": per_device / peak_flops if peak_flops else None,
        "peak_memory_bytes": cost.peak_memory_bytes,
        "padding": 1 - report.tokens / max(1, report.padded_tokens),
        "data_wait": cost.data_wait / seconds,
        "unreadable_samples": report.skipped_samples,
        "repeated_reads": cost.repeated_reads,
    }


def _mfu(record: dict[str, Any]) -> str:
    return "" if record["mfu"] is None else f"MFU {record['mfu']:.1%} | "


def format_duration(seconds: float) -> str:
    """Format a duration as `1h 02m`, `3m 07s` or `8s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def _describe_validation(report: StepReport) -> str:
    unreadable = f", {report.skipped_samples} of them unreadable" if report.skipped_samples else ""
    on = f"on {report.samples} samples{unreadable}"
    if not report.loss_tokens:
        return f"no loss {on}: no supervised token"
    tasks = ", ".join(f"{task} {loss:.3f}" for task, loss in report.task_losses.items())
    return f"loss {report.loss:.4f} {on} ({tasks})"


class MetricsLog:
    """Writer of the metrics on rank 0; does nothing on other ranks.

    Files: `metrics.jsonl` (one record per start, logged step, validation and save, appended over resumes; numbers
    that are not finite are null) and `tensorboard/`. Steps that were not applied are always logged. A full disk loses
    records but does not stop the run.

    Args:
        config: configuration of the run.
        is_rank0: whether this is rank 0.
        first_step: number of steps completed before.
        guard: called before every write; raises if another start has taken the run over.
    """

    def __init__(
        self, config: RunConfig, is_rank0: bool, first_step: int, guard: Callable[[], None] = lambda: None
    ) -> None:
        self._config = config
        self._guard = guard
        self._writes = is_rank0
        self._file: RecordFile | None = None
        self._board: Any = None
        self._has_board = config.logging.tensorboard and find_spec("tensorboard") is not None
        self._failing = False
        self._began = time.monotonic()
        self._first_step = first_step
        if is_rank0:
            if config.logging.tensorboard and not self._has_board:
                logger.warning(
                    "logging.tensorboard: expected the package tensorboard, found none; metrics.jsonl alone"
                )
            with self._tolerate_write_errors():
                self._file = self._open_file()
                self._board = self._open_board(first_step)

    def due(self, step: int, applied: bool) -> bool:
        """Return whether a step (from 0) is logged; the same on every rank."""
        return (step + 1) % self._config.logging.interval == 0 or not applied

    def train(self, record: dict[str, Any]) -> None:
        """Log a training step (0-based `record["step"]`)."""
        if self._writes:
            self._write({"kind": "train", **record}, prefix="train")
            logger.info(self._progress_line(record))

    def validation(self, step: int, report: StepReport) -> None:
        """Log a validation after `step` steps."""
        losses = {f"loss/{task}": loss for task, loss in report.task_losses.items()}
        if self._writes:
            self._write(
                {"kind": "validation", "step": step, "loss": report.loss, **losses}, prefix="validation"
            )
            logger.info("step %d validation: %s", step, _describe_validation(report))

    def event(self, kind: str, **values: Any) -> None:
        """Record an event, such as a save."""
        if self._writes:
            self._write({"kind": kind, **values}, prefix=kind)

    def close(self) -> None:
        """Flush and close the files."""
        for stream in (self._file, self._board):
            if stream is not None:
                with self._tolerate_write_errors():
                    stream.close()

    @contextmanager
    def _tolerate_write_errors(self) -> Iterator[None]:
        """Log a write error in place of raising it: once, and again only after a successful write."""
        try:
            yield
        except OSError as error:
            if not self._failing:
                logger.warning("metrics cannot be written, going on without: %s", error)
            self._failing = True
        else:
            self._failing = False

    def _write(self, record: dict[str, Any], prefix: str) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self._tolerate_write_errors():
            self._guard()
            self._file = self._file or self._open_file()
            self._file.append({**finite, "time": time.time()})
            self._write_scalars(record, prefix)

    def _write_scalars(self, record: dict[str, Any], prefix: str) -> None:
        self._board = self._board or self._open_board(record["step"])
        if self._board is None:
            return
        try:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(f"{prefix}/{name}", value, record["step"])
        except OSError:
            self._board = None  # its thread has ended with the error; the next record opens a new writer
            raise

    def _open_file(self) -> RecordFile:
        folder = Path(self._config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return RecordFile(folder / "metrics.jsonl")

    def _open_board(self, first_step: int) -> Any:
        """Open a TensorBoard writer whose steps from `first_step` replace older ones; None if TensorBoard is off."""
        if not self._has_board:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(Path(self._config.run_dir) / "tensorboard"), purge_step=first_step)

    def _progress_line(self, record: dict[str, Any]) -> str:
        done, total = record["step"] + 1, self._config.train.steps
        elapsed = time.monotonic() - self._began
        left = elapsed / max(1, done - self._first_step) * (total - done)
        skipped = "" if record["applied"] else f" | NOT APPLIED: {record['not_applied_because']}"
        loss = f"{record['loss']:.4f}" if record["loss_tokens"] else "none"
        return (
            f"step {done}/{total} | loss {loss} | grad {record['grad_norm']:.2f} | "
            f"lr {record['lr']:.2e} | {record['samples_per_second']:.1f} samples/s | "
            f"{record['tokens_per_second']:.0f} tokens/s | {record['tflops_per_device']:.3g} TFLOP/s/device | "
            f"{_mfu(record)}padding {record['padding']:.1%} | data wait {record['data_wait']:.0%} | "
            f"{format_duration(left)} left{skipped}"
        )
