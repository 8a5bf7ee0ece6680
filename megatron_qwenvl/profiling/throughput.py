"""Throughput of a run over some of its steps, from its metrics, and a table of several runs.

Needs neither torch nor megatron-core.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_qwenvl.runtime.json_lines import read_records

MetricsRecord = dict[str, Any]


class IncompleteRun(RuntimeError):
    """The metrics do not contain all steps to measure."""


@dataclass(frozen=True)
class Throughput:
    """Totals of the measured steps divided by their total time, so that long steps have their full weight."""

    steps: int
    """Steps measured."""
    devices: int
    """Processes, each on its own device."""
    data_parallel: int
    """Data-parallel size."""
    micro_batches: float
    """Micro-batches of a step on each data-parallel rank, on average."""
    step_seconds: float
    """Wall time of a step, on average."""
    slowest_step_seconds: float
    """Wall time of the slowest step."""
    samples_per_second: float
    """Over all devices."""
    images_per_second: float
    """Over all devices."""
    tokens_per_second: float
    """Decoder positions without padding, over all devices."""
    tflops_per_device: float
    """Model FLOPs (see `model.flops`) / 1e12 per second and device."""
    mfu: float | None
    """Model FLOP/s as a share of the device's dense bf16 peak; None if that is unknown."""
    peak_memory_bytes: int
    """Largest memory of a rank in the measured steps (see `Runtime.peak_memory_bytes`)."""
    data_wait: float
    """Share of the time that the rank with the longest data wait waited."""
    padding: float
    """Share of decoder positions that are padding."""


@dataclass(frozen=True)
class Row:
    """Row of the table: the throughput of a layout, or the reason of its failure."""

    layout: str
    """Text of the layout."""
    folder: str
    """Folder of its log and metrics."""
    result: Throughput | None
    """Measured throughput; None after a failure."""
    reason: str | None = None
    """Reason of a failure."""


def read_metrics(path: Path) -> tuple[MetricsRecord, list[MetricsRecord]]:
    """Read the newest start record of a run and the step records after it.

    Raises:
        IncompleteRun: the run never started to train.
    """
    records = list(read_records(path)) if path.exists() else []
    starts = [place for place, record in enumerate(records) if record["kind"] == "start"]
    if not starts:
        raise IncompleteRun(f"{path}: the run never started to train")
    since = records[starts[-1] :]
    return since[0], [record for record in since if record["kind"] == "train"]


def measure_throughput(
    start: MetricsRecord, steps: Sequence[MetricsRecord], warmup: int, measured: int
) -> Throughput:
    """Compute the throughput of `measured` steps after the first `warmup`, from the result of `read_metrics`.

    Raises:
        IncompleteRun: there are fewer steps, or not every step was logged.
    """
    chosen = steps[warmup : warmup + measured]
    expected = [start["step"] + warmup + number for number in range(measured)]
    if [record["step"] for record in chosen] != expected:
        raise IncompleteRun(f"expected records of {warmup + measured} steps in a row, found {len(steps)}")

    def total(name: str) -> float:
        return float(sum(record[name] for record in chosen))

    seconds, devices, peak = total("seconds"), start["processes"], start["peak_flops_per_device"]
    flops_per_device = total("flops") / seconds / devices
    return Throughput(
        steps=measured,
        devices=devices,
        data_parallel=start["data_parallel"],
        micro_batches=total("micro_batches") / measured,
        step_seconds=seconds / measured,
        slowest_step_seconds=max(record["seconds"] for record in chosen),
        samples_per_second=total("samples") / seconds,
        images_per_second=total("images") / seconds,
        tokens_per_second=total("tokens") / seconds,
        tflops_per_device=flops_per_device / 1e12,
        mfu=flops_per_device / peak if peak else None,
        peak_memory_bytes=max(record["peak_memory_bytes"] for record in chosen),
        data_wait=sum(record["data_wait"] * record["seconds"] for record in chosen) / seconds,
        padding=1 - total("tokens") / total("padded_tokens"),
    )


_COLUMNS: dict[str, Callable[[Throughput], str]] = {
    "data parallel": lambda r: str(r.data_parallel),
    "micro-batches": lambda r: f"{r.micro_batches:.4g}",
    "step s": lambda r: _digits(r.step_seconds),
    "slowest s": lambda r: _digits(r.slowest_step_seconds),
    "samples/s": lambda r: _digits(r.samples_per_second),
    "images/s": lambda r: _digits(r.images_per_second),
    "tokens/s": lambda r: _digits(r.tokens_per_second),
    "TFLOP/s/device": lambda r: _digits(r.tflops_per_device),
    "MFU": lambda r: "-" if r.mfu is None else f"{r.mfu:.1%}",
    "memory GiB": lambda r: f"{r.peak_memory_bytes / 2**30:.2f}",
    "data wait": lambda r: f"{r.data_wait:.1%}",
    "padding": lambda r: f"{r.padding:.1%}",
}
_MEANING = (
    "Totals of the measured steps divided by their total time; samples, images and tokens (without padding) over all "
    "devices. TFLOP/s: model FLOPs, without padding and recomputation; MFU: their share of the dense bf16 peak. "
    "Memory: the largest of any rank. Data wait: share of the time that the rank which waited longest for data waited."
)


def _digits(value: float) -> str:
    """Format with three significant digits; numbers from 1000 with all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def render_markdown(header: dict[str, Any], rows: Sequence[Row]) -> str:
    """Render the table below its header; a last column holds the reasons of failures, if any."""
    failed = any(row.result is None for row in rows)
    names = ["layout", *_COLUMNS, *(["failed because"] if failed else [])]
    aligned = [":--", *["--:"] * len(_COLUMNS), *([":--"] if failed else [])]
    lines = ["# Throughput", ""]
    lines += [f"- {name.replace('_', ' ')}: {_format_value(value)}" for name, value in header.items()]
    lines += ["", _line(names), _line(aligned)]
    for row in rows:
        result = row.result
        cells = [show(result) if result is not None else "-" for show in _COLUMNS.values()]
        lines.append(_line([f"`{row.layout}`", *cells, *([row.reason or ""] if failed else [])]))
    return "\n".join([*lines, "", _MEANING, ""])


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items()) or "-"
    return "-" if value in (None, "") else str(value)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write_table(folder: Path, header: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write `throughput.json` and `throughput.md`, each atomically."""
    tree = {**header, "layouts": [asdict(row) for row in rows]}
    _replace(
        folder / "throughput.json", json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    _replace(folder / "throughput.md", render_markdown(header, rows))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
