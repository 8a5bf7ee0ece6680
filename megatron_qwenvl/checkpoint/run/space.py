"""How much room the checkpoints of a run take."""

from __future__ import annotations

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.model.shapes import count_parameters


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one training checkpoint of the run.

    All weights in the training precision, and for every trained element the two fp32 moments and, unless unsharded fp32
    weights are their own master, the fp32 master weight. File headers, indices and the manifest, some kB per tensor,
    are not counted.
    """
    counts = count_parameters(config).values()
    elements, trained = sum(total for total, _ in counts), sum(trained for _, trained in counts)
    bf16 = config.train.precision == "bf16"
    has_master = bf16 or config.optimizer.sharded
    return elements * (2 if bf16 else 4) + trained * (12 if has_master else 8)


def checkpoints_to_come(config: RunConfig, kept: int) -> int:
    """Checkpoints that the run writes before the first one is removed: a new one is complete before an old one goes.

    Args:
        config: the run.
        kept: checkpoints that it has already.
    """
    return max(1, config.checkpoint.keep_last + 1 - kept)
