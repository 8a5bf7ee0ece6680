"""Validation across fields: contradictions that the type of a single field cannot exclude.

Every message starts with the fields concerned and names the expected and the found values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from megatron_qwenvl.architecture.model import describe, family_of

from .schema import RunConfig, SourceConfig


def find_problems(config: RunConfig, world_size: int | None) -> list[str]:
    """Find all contradictions in a configuration.

    Args:
        config: configuration whose single fields are valid.
        world_size: number of processes; None: unknown, the fields that depend on it are not checked.

    Returns:
        One line per contradiction, empty if there is none.
    """
    return [
        *_shape_problems(config),
        *_parallel_problems(config),
        *_layout_problems(config),
        *_world_problems(config, world_size),
        *_image_problems(config),
        *_length_problems(config),
        *_source_problems(config),
        *_skip_problems(config),
        *_training_problems(config),
    ]


def _indivisible(name: str, value: int, by_name: str, by: int) -> Iterator[str]:
    if value % by:
        yield f"{name}: expected a multiple of {by_name} ({by}), found {value}"


def _shape_problems(config: RunConfig) -> Iterator[str]:
    """Check head sizes: integers, even in the decoder for rotary, a multiple of 4 for sin-cos positions."""
    vision, adapter, decoder = config.model.vision, config.model.adapter, config.model.decoder
    hidden = "model.decoder.hidden"
    yield from _indivisible("model.vision.width", vision.width, "model.vision.heads", vision.heads)
    yield from _indivisible(hidden, decoder.hidden, "model.adapter.heads", adapter.heads)
    if decoder.hidden % (2 * decoder.heads):
        yield (
            f"{hidden}: expected a multiple of 2 x model.decoder.heads ({2 * decoder.heads}), because rotary "
            f"positions need an even head size, found {decoder.hidden}"
        )
    yield from family_of(decoder).problems(decoder)
    if decoder.hidden % 4:
        yield f"{hidden}: expected a multiple of 4 for the adapter's 2-D positions, found {decoder.hidden}"


def _parallel_problems(config: RunConfig) -> Iterator[str]:
    parallel, architecture = config.parallel, describe(config.model)
    possible = " or ".join(map(str, architecture.tensor_parallel_sizes()))
    for name, size in architecture.divided_sizes():
        for problem in _indivisible(name, size, "parallel.tensor", parallel.tensor):
            yield f"{problem}; this model can have parallel.tensor {possible}"
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield "parallel.sequence_parallel: expected parallel.tensor > 1 to shard sequences over, found 1"
    hang, timeout = config.runtime.hang_minutes, config.runtime.timeout_minutes
    if hang >= timeout:
        yield f"runtime.hang_minutes: expected less than runtime.timeout_minutes ({timeout:g}), found {hang:g}"
    limit = "hang_minutes" if hang else "timeout_minutes"
    if (retry := config.runtime.retry_minutes) is not None and retry >= (hang or timeout):
        yield f"runtime.retry_minutes: expected less than runtime.{limit} ({hang or timeout:g}), found {retry:g}"
    if config.runtime.device == "cpu" and config.runtime.kernels in ("te", "apex"):
        yield f"runtime.kernels: expected auto or torch with runtime.device cpu, found {config.runtime.kernels}"


def _layout_problems(config: RunConfig) -> Iterator[str]:
    """Check the layout of the list of patch embedding, ViT layers, adapter, word embedding, decoder layers, head."""
    pipeline, layout = config.parallel.pipeline, config.parallel.layout
    layers = config.model.vision.layers + config.model.decoder.layers + 4
    if pipeline > layers:
        yield f"parallel.pipeline: expected at most the number of layers of the model ({layers}), found {pipeline}"
    if layout is None:
        return
    found = list(layout)
    if len(layout) != pipeline - 1:
        yield (
            f"parallel.layout: expected parallel.pipeline - 1 = {pipeline - 1} first layers of the later pipeline "
            f"stages, found {len(layout)}: {found}"
        )
    if any(later <= earlier for earlier, later in pairwise(layout)):
        yield f"parallel.layout: expected strictly increasing layer indices, found {found}"
    if any(not 1 <= index < layers for index in layout):
        yield f"parallel.layout: expected layer indices from 1 to {layers - 1}, found {found}"


def _world_problems(config: RunConfig, world_size: int | None) -> Iterator[str]:
    if world_size is None:
        return
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    if world_size % (tensor * pipeline):
        yield (
            f"parallel.tensor, parallel.pipeline: expected a number of processes that is a multiple of "
            f"{tensor} x {pipeline} = {tensor * pipeline}, found {world_size}"
        )
        return
    data_parallel = world_size // (tensor * pipeline)
    batch, accumulation = config.data.global_batch_size, config.train.gradient_accumulation
    if config.data.packing != "none" and batch < data_parallel:
        yield (
            f"data.global_batch_size: expected at least one sample for each of {data_parallel} data-parallel ranks, "
            f"found {batch}"
        )
    if config.data.packing == "none" and batch % (data_parallel * accumulation):
        yield (
            f"data.global_batch_size: expected a multiple of data-parallel size x train.gradient_accumulation = "
            f"{data_parallel} x {accumulation}, found {batch}"
        )


def _image_problems(config: RunConfig) -> Iterator[str]:
    size, patch = config.data.image_size, config.model.vision.patch_size
    if size % patch:
        yield from _indivisible("data.image_size", size, "model.vision.patch_size", patch)
    elif config.parallel.sequence_parallel and (size // patch) ** 2 % config.parallel.tensor:
        yield (
            f"data.image_size: expected a number of patches that is a multiple of parallel.tensor "
            f"({config.parallel.tensor}) with parallel.sequence_parallel, found {(size // patch) ** 2}"
        )
    needed = config.model.image_tokens + 2
    if needed > config.data.max_sample_length:
        yield (
            f"data.max_sample_length: expected at least the {needed} tokens of one image "
            f"(model.adapter.query_grid^2 + 2), found {config.data.max_sample_length}"
        )


def _length_problems(config: RunConfig) -> Iterator[str]:
    data, parallel = config.data, config.parallel
    packed = data.packing != "none"
    if packed and data.pack_length < data.max_sample_length:
        yield (
            f"data.pack_length: expected at least data.max_sample_length ({data.max_sample_length}), "
            f"found {data.pack_length}"
        )
    if parallel.sequence_parallel:
        name = "data.pack_length" if packed else "data.max_sample_length"
        length = data.pack_length if packed else data.max_sample_length
        yield from _indivisible(name, length, "parallel.tensor", parallel.tensor)


def _source_problems(config: RunConfig) -> Iterator[str]:
    if not config.data.sources:
        yield "data.sources: expected at least one source, found none"
    yield from _duplicates("data.sources", config.data.sources)
    yield from _duplicates("data.validation_sources", config.data.validation_sources)


def _skip_problems(config: RunConfig) -> Iterator[str]:
    """Check that ranges of steps are ordered and do not overlap."""
    ranges = sorted(config.data.skip_steps)
    for first, last in ranges:
        if not 0 <= first <= last:
            yield f"data.skip_steps: expected [a, b] with 0 <= a <= b, found [{first}, {last}]"
    for (first, last), (next_first, next_last) in pairwise(ranges):
        if next_first <= last and first <= last:
            yield (
                f"data.skip_steps: expected ranges that do not overlap, found [{first}, {last}] and "
                f"[{next_first}, {next_last}]"
            )


def _duplicates(field: str, sources: tuple[SourceConfig, ...]) -> Iterator[str]:
    for name, count in Counter(source.name for source in sources).items():
        if count > 1:
            yield f"{field}: expected unique names, found {name!r} {count} times"


def _training_problems(config: RunConfig) -> Iterator[str]:
    train, optimizer = config.train, config.optimizer
    if {"vit", "adapter", "decoder"} <= set(train.frozen):
        yield f"train.frozen: expected a part that is left to train, found {list(train.frozen)}"
    if train.stop_after is not None and train.stop_after > train.steps:
        yield f"train.stop_after: expected at most train.steps ({train.steps}), found {train.stop_after}"
    if not config.checkpoint.save and train.stop_after is None:
        yield "checkpoint.save: expected true without train.stop_after, because nothing of the run is kept, found false"
    if optimizer.warmup_steps >= train.steps:
        yield (
            f"optimizer.warmup_steps: expected fewer than train.steps ({train.steps}), found {optimizer.warmup_steps}"
        )
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr: expected at most optimizer.lr ({optimizer.lr}), found {optimizer.min_lr}"
