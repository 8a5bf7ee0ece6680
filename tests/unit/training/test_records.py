"""Records survive whatever interrupts their writing: every line is whole, and none is lost but the torn one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_qwenvl.runtime.json_lines import RecordFile, read_records

WHOLE = [{"step": number, "text": "x" * 40} for number in range(3)]
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in WHOLE)


@pytest.mark.parametrize("cut", [*range(1, 60), 0])
def test_a_file_cut_anywhere_goes_on_with_whole_lines(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES[: len(LINES) - cut])
    file = RecordFile(path)
    file.append({"step": 9})
    file.close()
    kept = WHOLE if cut < 2 else WHOLE[:2]  # a record that lacks its line end alone is completed
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *kept[: 3 - cut // 58],
        {"step": 9},
    ]


@pytest.mark.parametrize("tail", [b"\0" * 5000, b"x" * 200_000, b"[1, 2]", b"\xff", b'{"a": 1', b"7"])
def test_a_tail_that_is_no_record_is_cut_off(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES + tail)
    assert list(read_records(path)) == WHOLE
    RecordFile(path).close()
    assert path.read_bytes() == LINES


def test_an_empty_or_missing_file_starts_afresh(tmp_path: Path) -> None:
    for content in (None, b"", b"torn"):
        path = tmp_path / "metrics.jsonl"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        file = RecordFile(path)
        file.append({"a": 1})
        file.close()
        assert list(read_records(path)) == [{"a": 1}]


def test_a_write_that_fails_half_way_costs_its_record_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = RecordFile(tmp_path / "metrics.jsonl")
    file.append(WHOLE[0])
    real, calls = os.pwrite, [0]

    def half(descriptor: int, data: bytes, offset: int) -> int:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[: len(data) // 2], offset)

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(OSError, match="No space"):
        file.append(WHOLE[1])
    monkeypatch.setattr(os, "pwrite", real)
    file.append(WHOLE[2])
    file.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == LINES.splitlines(True)[0] + LINES.splitlines(True)[2]
