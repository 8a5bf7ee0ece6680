"""Small models and micro-batches for tests, and the gradients of a whole model gathered from its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from megatron_qwenvl.batch import IGNORED_TASK, Batch
from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.config.schema import AdapterConfig, DecoderConfig, ModelConfig, RunConfig, VisionConfig
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.model.build import build_stage, initialize_weights
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.step import StepReport, StepRunner

SMALL = ModelConfig(
    vision=VisionConfig(layers=4, width=32, heads=4, mlp_hidden=48, position_grid=4),
    adapter=AdapterConfig(query_grid=2, heads=4),
    decoder=DecoderConfig(layers=3, hidden=48, heads=4, ffn_hidden=64, vocab_size=128),
    init_std=0.1,
)
"""4 ViT layers + 3 decoder layers: 11 entries in the layer list."""


SMALL_QWEN2 = SMALL.model_copy(
    update={
        "decoder": DecoderConfig(
            family="qwen2",
            layers=3,
            hidden=56,
            heads=14,
            query_groups=2,
            ffn_hidden=72,
            vocab_size=128,
            rotary_base=1_000_000,
        )
    }
)
"""The same with Qwen2.5-7B's proportion of query heads to key-value groups."""


def small_config(
    frozen: Sequence[str] = (), image_size: int = 56, model: ModelConfig = SMALL, **parallel: Any
) -> RunConfig:
    """A valid configuration of a small model with the given frozen parts and layout."""
    base = RECIPES["tiny_stage2"]()
    return RunConfig.model_validate(
        {
            **base.model_dump(),
            "model": model.model_dump(),
            "data": {
                **base.data.model_dump(),
                "image_size": image_size,
                "pack_length": 48,
                "max_sample_length": 48,
            },
            "train": {**base.train.model_dump(), "frozen": tuple(frozen)},
            "parallel": parallel,
            "optimizer": {**base.optimizer.model_dump(), "sharded": False},
        }
    )


def make_batch(seed: int, images: int, config: RunConfig, length: int = 48) -> Batch:
    """A micro-batch of three isolated segments, `images` images in the first two, random supervised positions."""
    generator = torch.Generator().manual_seed(seed)
    slots = config.model.image_tokens
    bounds = [0, 20, 38, length]
    starts = [1 + (slots + 2) * i for i in range(3)] + [21 + (slots + 2) * i for i in range(3)]
    order = [starts[i] for i in (0, 3, 1, 4, 2, 5)][:images]
    sample_ids = torch.cat(
        [
            torch.full((b - a,), i, dtype=torch.int32)
            for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))
        ]
    )
    loss_mask = (torch.rand(length, generator=generator) < 0.4).float()
    task_ids = torch.where(
        loss_mask > 0, sample_ids.to(torch.uint8), torch.tensor(IGNORED_TASK, dtype=torch.uint8)
    )
    size = config.data.image_size
    return Batch(
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        position_ids=torch.cat([torch.arange(b - a) for a, b in zip(bounds, bounds[1:], strict=False)]),
        num_images=images,
        image_starts=torch.tensor(sorted(order), dtype=torch.int64),
        num_samples=3,
        tokens=torch.randint(0, 128, (length,), generator=generator),
        labels=torch.randint(0, 128, (length,), generator=generator),
        loss_mask=loss_mask,
        task_ids=task_ids,
        sample_ids=sample_ids,
        pixels=torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator),
        real_tokens=length,
    )


def build_runner(process: ProcessInfo, config: RunConfig, seed: int = 0) -> StepRunner:
    """Start the engine on this rank and build its part of the model with layout-independent weights."""
    runtime = start_engine(config, process)
    partition = make_partition(config, runtime.data_size)
    stage = build_stage(config, runtime, partition)
    initialize_weights(stage, config.model, seed)
    return StepRunner.build(config, runtime, partition, stage)


def share(runner: StepRunner, batches: Sequence[Batch]) -> list[Batch]:
    """This data-parallel rank's micro-batches."""
    return list(batches[runner.runtime.data_rank :: runner.runtime.data_size])


def local_gradients(runner: StepRunner) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]:
    """(checkpoint key, full shape, offset, gradient shard) of every trained tensor on this rank."""
    found = []
    for entry in runner.model.module.sharded_state_dict().values():
        if not entry.data.requires_grad:
            assert entry.data.grad is None and getattr(entry.data, "main_grad", None) is None, entry.key
            continue
        entry.data = entry.data.main_grad
        for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            found.append((part.key, part.global_shape, part.global_offset, part.data.clone()))
    return found


def gradients_of(process: ProcessInfo, config: RunConfig, batches: Sequence[Batch]) -> dict[str, Any]:
    """Loss report, gradient shards and backward messages of one accumulated step."""
    runner = build_runner(process, config)
    report: StepReport = runner.accumulate(share(runner, batches))
    return {
        "report": report,
        "gradients": local_gradients(runner),
        "gradients_received": runner.communicator.gradients_received,
        "stage": runner.runtime.pipeline_rank,
    }


def assemble(shards: Sequence[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]) -> dict[str, Tensor]:
    """Whole tensors from shards; replicas must agree where they overlap."""
    whole: dict[str, Tensor] = {}
    for key, shape, offset, shard in shards:
        full = whole.setdefault(key, torch.full(shape, float("nan")))
        window = tuple(slice(o, o + n) for o, n in zip(offset, shard.shape, strict=True))
        known = ~full[window].isnan()
        torch.testing.assert_close(
            full[window][known], shard[known], rtol=1e-4, atol=1e-6, msg=f"replicas of {key}"
        )
        full[window] = shard
    for key, full in whole.items():
        assert not full.isnan().any(), f"{key} is not covered by the ranks' shards"
    return whole
