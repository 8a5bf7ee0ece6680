"""Checkpoint conversions against copying the same bytes with fsync on the same disk: time ratio and peak memory.

    python benchmarks/bench_convert.py [--directory DIR] [--vit-layers 48] [--decoder-layers 32]

Makes a published Qwen-VL directory with random weights (19.3 GB at full size; about 60 GB of free disk are needed),
then imports, compares (equal, and with a difference in every 256 kB, bit by bit and to a tolerance), verifies,
transitions and exports it. Every command is set against the mean of a copy right
before and one right after it: disks are noisy.
Peak memory is the resident size of the converter and its children.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from megatron_qwenvl.checkpoint.formats.hf_config import hf_config
from megatron_qwenvl.checkpoint.formats.names import TABLE_NAME, qwenvl_rules
from megatron_qwenvl.checkpoint.storage.safetensors_files import read_safetensors_header, write_safetensors
from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.config.schema import DecoderConfig, ModelConfig, VisionConfig
from megatron_qwenvl.model.positions import sincos_table
from megatron_qwenvl.model.shapes import tensor_shapes

TOOL = Path(__file__).resolve().parent.parent / "tools" / "convert_checkpoint.py"
FILE_BYTES = 2 << 30
COPY = """
import os, sys
from pathlib import Path
buffer, target = memoryview(bytearray(16 << 20)), Path(sys.argv[2])
target.mkdir()
for path in sorted(Path(sys.argv[1]).iterdir()):
    with path.open("rb", buffering=0) as source, (target / path.name).open("wb", buffering=0) as copy:
        while size := source.readinto(buffer):
            copy.write(buffer[:size])
        os.fsync(copy.fileno())
"""


def specs_of_model(model: ModelConfig) -> dict[str, TensorSpec]:
    """Shape and type of every published tensor."""
    shapes, specs = tensor_shapes(model), {}
    for rule in qwenvl_rules(model):
        megatron = [torch.empty(shapes[name], device="meta", dtype=torch.bfloat16) for name in rule.megatron]
        hf_tensors = rule.mapping.to_hf(megatron)
        specs |= {
            name: TensorSpec(tuple(t.shape), t.dtype) for name, t in zip(rule.hf, hf_tensors, strict=True)
        }
    specs[TABLE_NAME] = TensorSpec((model.image_tokens, model.decoder.hidden), torch.bfloat16)
    return specs


def write_hf_directory(folder: Path, model: ModelConfig) -> int:
    """Write a published directory with random weights; returns its tensors' bytes."""
    folder.mkdir(parents=True)
    specs, files, size = specs_of_model(model), [[]], 0  # type: ignore[var-annotated]
    for name in sorted(specs):
        if size > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += specs[name].nbytes

    def tensors(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            if name == TABLE_NAME:
                yield name, sincos_table(model.adapter.query_grid, model.decoder.hidden).to(torch.bfloat16)
            else:
                bits = torch.randint(-(2**15), 2**15 - 1, specs[name].shape, dtype=torch.int16)
                bits &= ~(1 << 14)  # numbers below 2: weights are neither infinite nor NaN
                yield name, bits.view(torch.bfloat16)

    weight_map = {}
    for number, names in enumerate(files):
        file = f"model-{number:05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        write_safetensors(folder / file, {name: specs[name] for name in names}, tensors(names))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(hf_config(model, 448, "bfloat16")))
    return sum(spec.nbytes for spec in specs.values())


def resident(process: psutil.Process) -> int:
    """Resident bytes of a process and its children."""
    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            total += member.memory_info().rss
    except psutil.Error:  # it has just ended
        pass
    return total


def change_all(folder: Path) -> None:
    """Flip the lowest bit of a number in every 256 kB of the weights; doing it again restores them."""
    for file in sorted(folder.glob("*.safetensors")):
        begin = min(tensor.offset for tensor in read_safetensors_header(file).values())
        content = np.memmap(file, np.uint8, "r+", begin)
        content[:: 1 << 18] ^= 1
        content.flush()


def run(*command: str, expected: int = 0) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command that must end with the expected exit code."""
    os.sync()  # so that the command does not wait for earlier writes
    began, peak = time.monotonic(), 0
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, resident(watched))
            time.sleep(0.03)
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    if process.returncode != expected:
        raise SystemExit(f"{' '.join(command[:3])}: exit code {process.returncode}\n{errors[-2000:]}")
    return time.monotonic() - began, peak


def copy(source: Path) -> float:
    """Seconds for copying a directory with fsync."""
    target = source.with_name("copy")
    seconds, _ = run("-c", COPY, str(source), str(target))
    shutil.rmtree(target)
    return seconds


def main() -> int:
    """Print a table of the conversions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, default=Path("runs/bench_convert"), help="scratch, removed at the end"
    )
    parser.add_argument("--vit-layers", type=int, default=48)
    parser.add_argument("--decoder-layers", type=int, default=32)
    arguments = parser.parse_args()
    scratch: Path = arguments.directory.resolve()
    shutil.rmtree(scratch, ignore_errors=True)
    model = ModelConfig(
        vision=VisionConfig(layers=arguments.vit_layers),
        decoder=DecoderConfig(layers=arguments.decoder_layers),
    )
    hf, megatron = scratch / "hf", scratch / "megatron"
    size = write_hf_directory(hf, model)
    copy(hf)  # warm-up: the first copy on an idle machine is slow
    before = copy(hf)
    print(f"{size / 1e9:.2f} GB; copy with fsync {before:.1f} s ({size / before / 1e6:.0f} MB/s)", flush=True)
    exported = ["export-qwenvl", "--from", str(megatron), "--out", str(scratch / "exported")]
    commands: list[tuple[str, list[str], int]] = [
        ("import-qwenvl", ["import-qwenvl", "--from", str(hf), "--out", str(megatron)], 0),
        ("compare", ["compare", str(megatron), str(hf)], 0),
        ("  different", ["compare", str(megatron), str(hf)], 1),
        ("  tolerance", ["compare", str(megatron), str(hf), "--tolerance", "1e-3"], 1),
        ("verify", ["verify", str(megatron)], 0),
        (
            "next-stage",
            ["next-stage", "--from", str(megatron), "--to", "stage2", "--out", str(scratch / "next")],
            0,
        ),
        ("export-qwenvl", exported, 0),
    ]
    for name, command, expected in commands:
        if name.strip() in ("different", "verify"):
            change_all(hf)
        seconds, peak = run(str(TOOL), *command, expected=expected)
        shutil.rmtree(scratch / "next", ignore_errors=True)
        after = copy(hf)
        ratio = seconds / ((before + after) / 2)
        print(
            f"{name:14} {ratio:5.2f} x copy   {seconds:6.1f} s (copies {before:.1f} s and {after:.1f} s)   "
            f"peak {peak / 1e9:.2f} GB",
            flush=True,
        )
        before = after
    shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
