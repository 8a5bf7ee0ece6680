"""The content of a step in words, for `tools/show_step.py`."""

from __future__ import annotations

from megatron_qwenvl.data.records.tasks import TASKS

from .sample_table import SampleTable
from .sampler import MicroBatch, StepSampler


def describe_step(sampler: StepSampler, step: int, ranks: int) -> dict[str, object]:
    """Describe a step as JSON.

    Returns:
        `step`, and `packs`: a list with `dp_rank`, `micro_batch`, `tokens` and `images` (without padding), and
        `samples`: a list with `key`, `task`, `tokens`, `images`.
    """
    batch = sampler.global_batch(step)
    packs = [
        _describe_pack(sampler, batch.samples, rank, number, micro_batch)
        for rank, micro_batches in enumerate(sampler.balance_across_ranks(batch, ranks))
        for number, micro_batch in enumerate(micro_batches)
    ]
    return {"step": step, "packs": packs}


def _describe_pack(
    sampler: StepSampler, samples: SampleTable, rank: int, number: int, micro_batch: MicroBatch
) -> dict[str, object]:
    rows = [row for pack in micro_batch for row in pack]
    described = [
        {
            "key": sampler.key(samples, row),
            "task": TASKS[samples.task[row]],
            "tokens": int(samples.length[row]),
            "images": int(samples.images[row]),
        }
        for row in rows
    ]
    return {
        "dp_rank": rank,
        "micro_batch": number,
        "tokens": int(samples.length[rows].sum()),
        "images": int(samples.images[rows].sum()),
        "samples": described,
    }
