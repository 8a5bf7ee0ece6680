"""Partition of the layer list into pipeline stages of nearly equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_qwenvl.config.schema import RunConfig

from .flops import expected_workload, layer_flops
from .layers import Layer, list_layers


@dataclass(frozen=True)
class Partition:
    """Contiguous pipeline stages over the layer list."""

    layers: tuple[Layer, ...]
    starts: tuple[int, ...]
    """Index of the first layer of every pipeline stage; the first is 0."""
    costs: tuple[float, ...]
    """Expected FLOPs of every pipeline stage."""

    def stage(self, index: int) -> tuple[Layer, ...]:
        """Layers of a pipeline stage."""
        bounds = (*self.starts, len(self.layers))
        return self.layers[bounds[index] : bounds[index + 1]]

    def describe(self) -> str:
        """One line per pipeline stage: its layers and its cost relative to the slowest one."""
        slowest = max(self.costs) or 1.0
        lines = []
        for index, cost in enumerate(self.costs):
            stage = self.stage(index)
            span = stage[0].name if len(stage) == 1 else f"{stage[0].name} .. {stage[-1].name}"
            lines.append(
                f"pipeline stage {index}: {span} ({len(stage)} layers, {cost / slowest:.0%} of the slowest)"
            )
        return "\n".join(lines)


def balance(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Start indices of `stages` non-empty contiguous runs whose largest cost is smallest.

    Exact dynamic program over (pipeline stages used, first layer), O(`stages` x layers^2).

    Raises:
        ValueError: fewer layers than pipeline stages.
    """
    count = len(costs)
    if not 1 <= stages <= count:
        raise ValueError(f"expected 1 to {count} pipeline stages for {count} layers, found {stages}")
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    # best[i]: smallest possible maximum for layers i.. in k stages; cut[k][i]: where the first of them ends
    best = [prefix[count] - prefix[i] for i in range(count)]
    cuts: list[list[int]] = []
    for k in range(2, stages + 1):
        new, cut = [float("inf")] * count, [0] * count
        for i in range(count - k + 1):
            for j in range(i + 1, count - k + 2):
                worst = max(prefix[j] - prefix[i], best[j])
                if worst < new[i]:
                    new[i], cut[i] = worst, j
        best = new
        cuts.append(cut)
    starts = [0]
    for cut in reversed(cuts):
        starts.append(cut[starts[-1]])
    return tuple(starts)


def make_partition(config: RunConfig, data_parallel: int) -> Partition:
    """The partition of a run: `parallel.layout` if given, else balanced by expected FLOPs.

    `data_parallel` is needed to know the rows of an unpacked micro-batch.
    """
    layers = list_layers(config.model)
    rows = max(1, config.data.global_batch_size // (data_parallel * config.train.gradient_accumulation))
    work = expected_workload(config.model, config.data, rows)
    costs = layer_flops(config.model, config.train.frozen, work)
    if config.parallel.layout is not None:
        starts = (0, *config.parallel.layout)
    else:
        starts = balance(costs, config.parallel.pipeline)
    bounds = (*starts, len(layers))
    return Partition(layers, starts, tuple(sum(costs[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)))
