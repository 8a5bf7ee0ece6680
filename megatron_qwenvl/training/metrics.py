"""What a run tells: a progress line, a JSONL record and TensorBoard scalars per logged step."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any, TextIO

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.model.flops import total_flops

from .step import StepReport

logger = logging.getLogger(__name__)


def step_metrics(
    config: RunConfig,
    report: StepReport,
    step: int,
    seconds: float,
    data_wait: float,
    lr: float,
    devices: int,
) -> dict[str, Any]:
    """The record of one step.

    Rates are over all devices unless named `_per_device`; `tflops_per_device` counts model FLOPs of tokens and
    images without padding (see `model.flops`); `padding` is the share of decoder positions that are padding;
    `data_wait` is the share of the step spent waiting for data on rank 0.
    """
    patches = (config.data.image_size // config.model.vision.patch_size) ** 2
    flops = total_flops(config.model, config.train.frozen, report.workload(patches))
    return {
        "step": step,
        "loss": report.loss,
        **{f"loss/{task}": loss for task, loss in report.task_losses.items()},
        "grad_norm": report.grad_norm,
        "applied": report.applied,
        "lr": lr,
        "seconds": seconds,
        "samples": report.samples,
        "loss_tokens": report.loss_tokens,
        "samples_per_second": report.samples / seconds,
        "images_per_second": report.images / seconds,
        "tokens_per_second": report.tokens / seconds,
        "tflops_per_device": flops / seconds / devices / 1e12,
        "padding": 1 - report.tokens / max(1, report.padded_tokens),
        "data_wait": data_wait / seconds,
        "unreadable_samples": report.skipped_samples,
    }


def format_duration(seconds: float) -> str:
    """`1h 02m`, `3m 07s` or `8s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


class MetricsLog:
    """Writes metrics of rank 0 under the run directory; does nothing on other ranks.

    Files: `metrics.jsonl` (one record per logged step or validation, appended over resumes; numbers that are not
    finite are null) and `tensorboard/`. Steps that were not applied are always logged.
    """

    def __init__(self, config: RunConfig, is_main: bool, first_step: int) -> None:
        self._config = config
        self._file: TextIO | None = None
        self._board: Any = None
        self._began = time.monotonic()
        self._first_step = first_step
        if not is_main:
            return
        folder = Path(config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def train(self, record: dict[str, Any]) -> None:
        """Log a training step (0-based `record["step"]`)."""
        due = (record["step"] + 1) % self._config.logging.interval == 0 or not record["applied"]
        if self._file is None or not due:
            return
        self._write({"kind": "train", **record}, prefix="train")
        logger.info(self._progress_line(record))

    def validation(self, step: int, report: StepReport) -> None:
        """Log a validation after `step` steps."""
        losses = {f"loss/{task}": loss for task, loss in report.task_losses.items()}
        if self._file is not None:
            self._write(
                {"kind": "validation", "step": step, "loss": report.loss, **losses}, prefix="validation"
            )
            tasks = ", ".join(f"{task} {loss:.3f}" for task, loss in report.task_losses.items())
            logger.info(
                "step %d validation: loss %.4f on %d samples (%s)", step, report.loss, report.samples, tasks
            )

    def event(self, kind: str, **values: Any) -> None:
        """Record something that happened, such as a save."""
        if self._file is not None:
            self._write({"kind": kind, **values}, prefix=kind)

    def close(self) -> None:
        """Flush and close the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, record: dict[str, Any], prefix: str) -> None:
        assert self._file is not None
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps({**finite, "time": time.time()}, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(f"{prefix}/{name}", value, record["step"])

    def _progress_line(self, record: dict[str, Any]) -> str:
        done, total = record["step"] + 1, self._config.train.steps
        elapsed = time.monotonic() - self._began
        left = elapsed / max(1, done - self._first_step) * (total - done)
        skipped = "" if record["applied"] else " | NOT APPLIED: loss or gradient not finite"
        return (
            f"step {done}/{total} | loss {record['loss']:.4f} | grad {record['grad_norm']:.2f} | "
            f"lr {record['lr']:.2e} | {record['samples_per_second']:.1f} samples/s | "
            f"{record['tokens_per_second']:.0f} tokens/s | {record['tflops_per_device']:.3g} TFLOP/s/device | "
            f"padding {record['padding']:.1%} | data wait {record['data_wait']:.0%} | "
            f"{format_duration(left)} left{skipped}"
        )
