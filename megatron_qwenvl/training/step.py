"""One training step: micro-batches through megatron-core's schedule, exact token-mean loss, one update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_qwenvl.batch import Batch
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.records.tasks import TASKS
from megatron_qwenvl.engine.communicator import FrozenPrefixCommunicator
from megatron_qwenvl.engine.optimizer import apply_gradients
from megatron_qwenvl.engine.start import Runtime
from megatron_qwenvl.model.build import trains_before
from megatron_qwenvl.model.flops import Workload
from megatron_qwenvl.model.partition import Partition
from megatron_qwenvl.model.stage import QwenVLStage

from .optimizer import tag_parameters


@dataclass
class StepReport:
    """Loss and counts of a step, the same on every rank."""

    loss: float
    """Mean cross-entropy per supervised token of the global batch, in nats; NaN where there is none."""
    task_losses: dict[str, float]
    """Mean loss per task in nats, for tasks with supervised tokens in the step."""
    loss_tokens: int
    tokens: int
    """Decoder positions without padding."""
    padded_tokens: int
    """Decoder positions with padding."""
    images: int
    samples: int
    skipped_samples: int
    """Samples whose loss was masked because they could not be read."""
    attention_pairs: int
    """Sum of length^2 over the attention segments (samples, or interleaved packs)."""
    micro_batches: int
    """Micro-batches of each data-parallel rank."""
    grad_norm: float = 0.0
    applied: bool = True

    @property
    def not_applied_because(self) -> str | None:
        """Reason why the weights were not updated; None if they were."""
        if self.applied:
            return None
        return "loss or gradient not finite" if self.loss_tokens else "no supervised token"

    def workload(self, patches: int) -> Workload:
        """The step's workload for FLOP accounting, without padding."""
        return Workload(self.images, patches, self.tokens, self.attention_pairs, self.loss_tokens)


def wrap_model(config: RunConfig, runtime: Runtime, stage: QwenVLStage) -> DistributedDataParallel:
    """Tag the parameters of a frozen pipeline stage and wrap it in megatron-core's DDP with fp32 gradients."""
    tag_parameters(stage, config)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.optimizer.sharded,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        check_for_nan_in_grad=False,  # a non-finite gradient skips the step instead of ending the run
    )
    model = DistributedDataParallel(stage.config, settings, stage, pg_collection=runtime.groups)
    stage.config.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_grad_reduce:
        stage.config.no_sync_func = model.no_sync
    model.train()
    return model


@dataclass
class StepRunner:
    """Runner of a step's micro-batches through the pipeline; independent of data sources and files."""

    config: RunConfig
    runtime: Runtime
    model: DistributedDataParallel
    communicator: FrozenPrefixCommunicator
    _schedule: object = field(init=False)

    def __post_init__(self) -> None:
        self._schedule = get_forward_backward_func()

    @classmethod
    def build(
        cls, config: RunConfig, runtime: Runtime, partition: Partition, stage: QwenVLStage
    ) -> StepRunner:
        """Wrap a pipeline stage and connect it to the previous and the next one."""
        rank = runtime.pipeline_rank
        through = rank + 1 == runtime.pipeline_size or trains_before(config, partition, rank + 1)
        communicator = FrozenPrefixCommunicator(
            runtime.groups.pp,
            stage.config,
            trained_before=trains_before(config, partition, rank),
            trained_through=through,
        )
        return cls(config, runtime, wrap_model(config, runtime, stage), communicator)

    def accumulate(self, batches: Sequence[Batch]) -> StepReport:
        """Forward and backward over this rank's micro-batches; leaves mean gradients in the model.

        `batches` has the same length on every rank.
        """
        self.model.zero_grad_buffer()
        return self._run(batches, forward_only=False)

    def train(self, batches: Sequence[Batch], optimizer: MegatronOptimizer) -> StepReport:
        """Make one optimizer step over the global batch, of which `batches` is this rank's share.

        The weights stay unchanged if the loss is not finite or the global batch has no supervised token.
        """
        optimizer.zero_grad()
        report = self.accumulate(batches)
        update = apply_gradients(optimizer, self.config.train.clip_grad, math.isfinite(report.loss))
        return replace(report, grad_norm=update.grad_norm, applied=update.applied)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> StepReport:
        """Loss over `batches` without gradients."""
        self.model.eval()
        try:
            return self._run(batches, forward_only=True)
        finally:
            self.model.train()

    def _run(self, batches: Sequence[Batch], forward_only: bool) -> StepReport:
        masked = self._mask_unreadable(batches)
        outputs = self._schedule(  # type: ignore[operator]
            forward_step_func=self._forward_step,
            data_iterator=iter(masked),
            model=[self.model],
            num_microbatches=len(masked),
            seq_length=1,  # boundary shapes travel with the tensors
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=self.communicator,
            pg_collection=self.runtime.groups,
        )
        return self._report(masked, torch.stack(outputs).sum(0) if outputs else self._zero_sums())

    def _zero_sums(self) -> Tensor:
        return torch.zeros(2, len(TASKS), dtype=torch.float64, device=self.runtime.device)

    def _forward_step(
        self, batches: Iterator[Batch], model: DistributedDataParallel
    ) -> tuple[Tensor, object]:
        batch = next(batches)
        positions, weights, tasks = _supervised(batch) if self.runtime.is_last_stage else (None, None, None)
        device = self.runtime.device
        output = model(batch.to(device), positions.to(device) if positions is not None else None)

        def loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert weights is not None and tasks is not None
            weight = weights.to(device)
            weighted = losses * weight
            sums = self._zero_sums()
            index = tasks.to(device)
            sums[0].index_add_(0, index, weighted.detach().double())
            sums[1].index_add_(0, index, weight.double())
            return weighted.sum(), weight.sum().int(), sums

        return output, loss

    def _mask_unreadable(self, batches: Sequence[Batch]) -> list[Batch]:
        """Mask the loss of samples that any rank of the model replica could not read."""
        counts = [batch.num_samples for batch in batches]
        flags = torch.zeros(max(1, sum(counts)), dtype=torch.uint8)
        offset = 0
        for batch, count in zip(batches, counts, strict=True):
            for ordinal in batch.bad_samples:
                flags[offset + ordinal] = 1
            offset += count
        agreed = self.runtime.model_parallel_max(flags.to(self.runtime.device)).cpu()
        masked = []
        for batch, bad in zip(batches, agreed[: sum(counts)].split(counts), strict=True):
            masked.append(_without_loss_of(batch, tuple(bad.nonzero().flatten().tolist())))
        return masked

    def _report(self, batches: Sequence[Batch], sums: Tensor) -> StepReport:
        """Reduce counts and losses over all ranks; each model replica contributes once."""
        counts_here = self.runtime.is_last_stage and self.runtime.tensor_rank == 0
        counts = torch.tensor(
            _counts(batches, self.config.data.packing == "interleaved"),
            dtype=torch.float64,
            device=self.runtime.device,
        )
        values = torch.cat([sums.flatten(), counts])
        totals = self.runtime.all_sum(values if counts_here else torch.zeros_like(values)).tolist()
        losses, tokens = totals[: len(TASKS)], totals[len(TASKS) : 2 * len(TASKS)]
        rest = [int(value) for value in totals[2 * len(TASKS) :]]
        return StepReport(
            loss=sum(losses) / sum(tokens) if sum(tokens) else math.nan,
            task_losses={t: s / n for t, s, n in zip(TASKS, losses, tokens, strict=True) if n},
            loss_tokens=int(sum(tokens)),
            tokens=rest[0],
            padded_tokens=rest[1],
            images=rest[2],
            samples=rest[3],
            skipped_samples=rest[4],
            attention_pairs=rest[5],
            micro_batches=len(batches),
        )


def _supervised(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Positions with loss, their weights and tasks; a single position of weight 0 if there is none."""
    assert batch.loss_mask is not None and batch.task_ids is not None
    positions = batch.loss_mask.nonzero().flatten()
    if not len(positions):
        return torch.zeros(1, dtype=torch.int64), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    return positions, batch.loss_mask[positions], batch.task_ids[positions].long()


def _without_loss_of(batch: Batch, bad: tuple[int, ...]) -> Batch:
    if not bad:
        return batch
    if batch.loss_mask is None or batch.sample_ids is None:
        return replace(batch, bad_samples=bad)
    lost = torch.isin(batch.sample_ids, torch.tensor(bad, dtype=batch.sample_ids.dtype))
    return replace(batch, bad_samples=bad, loss_mask=batch.loss_mask.masked_fill(lost, 0.0))


def _counts(batches: Sequence[Batch], interleaved: bool) -> list[float]:
    """Count tokens, padded tokens, images, samples, unreadable samples and attention pairs."""
    return [
        sum(batch.real_tokens for batch in batches),
        sum(batch.length for batch in batches),
        sum(batch.num_images for batch in batches),
        sum(batch.num_samples for batch in batches),
        sum(len(batch.bad_samples) for batch in batches),
        sum(_attention_pairs(batch, interleaved) for batch in batches),
    ]


def _attention_pairs(batch: Batch, interleaved: bool) -> float:
    """Sum of squared lengths of the attention segments: the filled part of an interleaved pack, or each sample."""
    if interleaved:
        return float(batch.real_tokens) ** 2
    assert batch.sample_ids is not None, "samples are known to every pipeline stage"
    return float((torch.bincount(batch.sample_ids[batch.sample_ids >= 0]).double() ** 2).sum())
