"""Rates of measured steps, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_qwenvl.profiling.throughput import (
    IncompleteRun,
    Row,
    measure_throughput,
    read_metrics,
    render_markdown,
    write_table,
)

START = {
    "kind": "start",
    "step": 0,
    "processes": 4,
    "data_parallel": 2,
    "device": "NVIDIA H100 80GB HBM3",
    "peak_flops_per_device": 100e12,
}


def step(number: int, seconds: float, **values: float) -> dict[str, Any]:
    record = {
        "kind": "train",
        "step": number,
        "seconds": seconds,
        "samples": 10,
        "images": 6,
        "tokens": 800,
        "padded_tokens": 1000,
        "micro_batches": 3,
        "flops": 400e12,
        "peak_memory_bytes": 1000,
        "data_wait": 0.0,
    }
    return {**record, **values}


# Two warm-up steps, then a fast and a slow one with twice the work for four times the time.
STEPS = [
    step(0, 100.0, peak_memory_bytes=9000, data_wait=1.0),
    step(1, 50.0),
    step(2, 1.0, data_wait=0.5),
    step(
        3,
        4.0,
        samples=20,
        images=18,
        tokens=1600,
        padded_tokens=4000,
        micro_batches=4,
        flops=800e12,
        peak_memory_bytes=2000,
        data_wait=0.25,
    ),
]


def test_rates_are_totals_over_total_time() -> None:
    found = measure_throughput(START, STEPS, warmup=2, measured=2)
    assert (found.steps, found.devices, found.data_parallel, found.micro_batches) == (2, 4, 2, 3.5)
    assert (found.step_seconds, found.slowest_step_seconds) == (2.5, 4.0)
    assert found.samples_per_second == 30 / 5  # the mean of the two rates is 7.5
    assert found.images_per_second == 24 / 5
    assert found.tokens_per_second == 2400 / 5
    assert found.tflops_per_device == 1200 / 5 / 4
    assert found.mfu == pytest.approx(60 / 100)
    assert found.peak_memory_bytes == 2000
    assert found.data_wait == (0.5 + 1.0) / 5
    assert found.padding == pytest.approx(1 - 2400 / 5000)


def test_no_utilisation_without_a_known_peak() -> None:
    found = measure_throughput({**START, "peak_flops_per_device": None}, STEPS, warmup=2, measured=2)
    assert found.mfu is None


@pytest.mark.parametrize("steps", [STEPS[:3], [*STEPS[:2], step(3, 1.0), step(4, 1.0)]])
def test_missing_steps_are_refused(steps: list[dict[str, Any]]) -> None:
    with pytest.raises(IncompleteRun, match="expected records of 4 steps in a row"):
        measure_throughput(START, steps, warmup=2, measured=2)


def test_only_the_newest_start_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(IncompleteRun, match="never started"):
        read_metrics(path)
    earlier = [START, step(0, 7.0)]
    later = [{**START, "processes": 2}, step(0, 1.0), {"kind": "save", "step": 1}, step(1, 2.0)]
    path.write_text("".join(json.dumps(record) + "\n" for record in earlier + later))
    start, steps = read_metrics(path)
    assert start["processes"] == 2
    assert [record["seconds"] for record in steps] == [1.0, 2.0]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").replace("\\|", "/").split("|")]


def test_the_table_says_what_was_measured_and_what_failed(tmp_path: Path) -> None:
    rows = [
        Row("tensor=2", "runs/01", measure_throughput(START, STEPS, warmup=2, measured=2)),
        Row("pipeline=2", "runs/02", None, "OutOfMemoryError: a | b"),
    ]
    header = {"recipe": "stage2", "hardware": "4 x NVIDIA H100", "revision": None, "versions": {"torch": "2"}}
    text = render_markdown(header, rows)
    assert "- hardware: 4 x NVIDIA H100\n- revision: -\n- versions: torch 2\n" in text
    table = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert {len(line) for line in table} == {14}
    good, bad = (dict(zip(table[0], line, strict=True)) for line in table[2:])
    assert good["layout"] == "`tensor=2`" and good["failed because"] == ""
    assert (good["step s"], good["slowest s"], good["micro-batches"]) == ("2.5", "4", "3.5")
    assert (good["samples/s"], good["images/s"], good["tokens/s"]) == ("6", "4.8", "480")
    assert (good["TFLOP/s/device"], good["MFU"], good["data wait"]) == ("60", "60.0%", "30.0%")
    assert (good["padding"], good["memory GiB"], good["data parallel"]) == ("52.0%", "0.00", "2")
    assert bad["failed because"] == "OutOfMemoryError: a / b" and bad["tokens/s"] == "-"
    assert "failed because" not in render_markdown(header, rows[:1])

    write_table(tmp_path, header, rows)
    assert (tmp_path / "throughput.md").read_text() == text
    tree = json.loads((tmp_path / "throughput.json").read_text())
    assert tree["recipe"] == "stage2"
    assert tree["layouts"][0]["result"]["samples_per_second"] == 6.0
    assert tree["layouts"][1]["result"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["throughput.json", "throughput.md"]
