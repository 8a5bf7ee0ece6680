"""A few layers at the full width of ViT, adapter and decoder on one GPU: Transformer Engine against local layers.

Run by `make gpu-check`; prints tokens/s, TFLOP/s and memory of every case.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import pytest
import torch

from megatron_qwenvl.batch import IGNORED_TASK, Batch
from megatron_qwenvl.config.recipes import stage1, stage2
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.model.flops import total_flops
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.optimizer import Schedule, build_optimizer
from tests.distributed.harness import run_ranks
from tests.distributed.model_cases import build_runner, local_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.device_count(), reason="no GPU is visible")]

STEPS = 12
WARM = 4
"""Steps left out of the timing."""
VOCABULARY = 32000


def full_width(recipe: str, kernels: str, packing: str) -> RunConfig:
    """A stage's recipe with 2 ViT and 2 decoder layers of full width, on one GPU."""
    base = {"stage1": stage1, "stage2": stage2}[recipe]()
    tree = base.model_dump()
    tree["model"]["vision"]["layers"] = tree["model"]["decoder"]["layers"] = 2
    tree["model"]["decoder"]["vocab_size"] = VOCABULARY
    tree["data"]["packing"] = packing
    tree["train"]["steps"] = 1000
    tree["optimizer"]["warmup_steps"] = 0
    tree["parallel"] = {}
    tree["runtime"] = {"device": "cuda", "kernels": kernels}
    return RunConfig.model_validate(tree)


def full_size_batch(config: RunConfig) -> Batch:
    """One micro-batch of image samples: packed isolated, or rows of one padded sample each."""
    generator = torch.Generator().manual_seed(0)
    data, slots = config.data, config.model.image_tokens
    sample = slots + 2 + 62
    if data.packing == "none":
        row = data.max_sample_length
        starts = list(range(0, 8 * row, row))
        bounds = [*starts, 8 * row]
    else:
        starts = list(range(0, data.pack_length - sample + 1, sample))
        bounds = [*starts, starts[-1] + sample] + ([data.pack_length] if data.pack_length % sample else [])
    length = bounds[-1]
    sample_ids = torch.full((length,), -1, dtype=torch.int32)
    loss_mask = torch.zeros(length)
    for i, start in enumerate(starts):
        sample_ids[start : start + sample] = i
        loss_mask[start + slots + 12 : start + sample - 1] = 1
    segments = torch.tensor(bounds)
    return Batch(
        cu_seqlens=segments.int(),
        position_ids=torch.cat([torch.arange(n) for n in segments.diff().tolist()]),
        num_images=len(starts),
        image_starts=torch.tensor(starts) + 1,
        num_samples=len(starts),
        tokens=torch.randint(0, VOCABULARY, (length,), generator=generator),
        labels=torch.randint(0, VOCABULARY, (length,), generator=generator),
        loss_mask=loss_mask,
        task_ids=torch.where(loss_mask > 0, 0, IGNORED_TASK).to(torch.uint8),
        sample_ids=sample_ids,
        pixels=torch.randint(
            0, 256, (len(starts), 3, data.image_size, data.image_size), dtype=torch.uint8, generator=generator
        ),
        real_tokens=len(starts) * sample,
    )


def train_steps(process: ProcessInfo, config: RunConfig) -> dict[str, Any]:
    """Gradients of the first micro-batch, then some steps on it: losses, rates and memory."""
    runner = build_runner(process, config)
    batch = full_size_batch(config)
    runner.accumulate([batch])
    gradients = {key: gradient.float().cpu() for key, _, _, gradient in local_gradients(runner)}
    optimizer, losses = build_optimizer(runner.model, config), []
    schedule = Schedule(optimizer, config)
    for step in range(STEPS):
        if step == WARM:
            runner.runtime.synchronize()
            began = time.perf_counter()
        schedule.set_step(step)
        report = runner.train([batch], optimizer)
        losses.append(report.loss)
    runner.runtime.synchronize()
    seconds = (time.perf_counter() - began) / (STEPS - WARM)
    patches = (config.data.image_size // config.model.vision.patch_size) ** 2
    return {
        "kernels": runner.runtime.kernels.name,
        "losses": losses,
        "gradients": gradients,
        "tokens_per_second": report.tokens / seconds,
        "tflops": total_flops(config.model, config.train.frozen, report.workload(patches)) / seconds / 1e12,
        "memory_gib": runner.runtime.peak_memory_bytes() / 2**30,
    }


@cache
def run_case(recipe: str, kernels: str, packing: str) -> dict[str, Any]:
    (result,) = run_ranks(1, train_steps, full_width(recipe, kernels, packing), timeout=500)
    print(
        f"\n{recipe} {packing:>8} {result['kernels']:>5}: {result['tokens_per_second']:,.0f} tokens/s, "
        f"{result['tflops']:.1f} TFLOP/s, {result['memory_gib']:.1f} GiB, "
        f"loss {result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}"
    )
    return result


@pytest.mark.parametrize("packing", ["isolated", "none"])
@pytest.mark.parametrize("recipe", ["stage1", "stage2"])
def test_transformer_engine_agrees_with_local_layers(recipe: str, packing: str) -> None:
    te, local = (run_case(recipe, kernels, packing) for kernels in ("te", "torch"))
    assert te["kernels"] == "te" and local["kernels"] == "torch"
    # bf16 keeps 8 bits: a mean over thousands of tokens agrees to a few 1e-3, a gradient tensor to some percent.
    assert te["losses"][0] == pytest.approx(local["losses"][0], rel=5e-3)
    for key, expected in local["gradients"].items():
        error = (te["gradients"][key] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < 0.05, f"{key}: relative difference {error:.3f}"
    assert te["losses"][-1] < te["losses"][0]
    assert te["losses"][-1] == pytest.approx(local["losses"][-1], rel=5e-2)
