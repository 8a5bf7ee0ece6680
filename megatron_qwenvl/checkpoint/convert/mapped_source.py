"""Tensors of a source on their way into the other format: what they will be, and one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_qwenvl.checkpoint.formats.mappings import Identity
from megatron_qwenvl.checkpoint.formats.rules import Rule
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.non_finite import NonFinite, find_non_finite
from megatron_qwenvl.checkpoint.storage.tensors import TensorSource, TensorSpec
from megatron_qwenvl.engine.checkpoint_tensors import DistributedFolder

FILE_BYTES = 1 << 30
"""Output files are about this large; a larger tensor has a file of its own."""


@dataclass(frozen=True)
class MappedSource:
    """Source of tensors together with the rules that map its tensors to the other format."""

    source: TensorSource
    rules: tuple[Rule, ...]


def megatron_specs(mapped: MappedSource) -> dict[str, TensorSpec]:
    """Names, shapes and types of the tensors in the megatron format.

    Raises:
        CheckpointError: a tensor of the source is missing or of a shape that its rule cannot take.
    """
    return _specs(mapped, lambda rule: (rule.hf, rule.megatron, rule.mapping.to_megatron))


def hf_specs(mapped: MappedSource) -> dict[str, TensorSpec]:
    """Names, shapes and types of the tensors in the Hugging Face format; raises as `megatron_specs`."""
    return _specs(mapped, lambda rule: (rule.megatron, rule.hf, rule.mapping.to_hf))


_Direction = Callable[[Rule], tuple[tuple[str, ...], tuple[str, ...], Callable[[list[Tensor]], list[Tensor]]]]


def _specs(mapped: MappedSource, direction: _Direction) -> dict[str, TensorSpec]:
    found: dict[str, TensorSpec] = {}
    for rule in mapped.rules:
        inputs, outputs, apply = direction(rule)
        missing = [name for name in inputs if name not in mapped.source.specs]
        if missing:
            raise CheckpointError(f"tensor {missing[0]} is missing")
        specs = [mapped.source.specs[name] for name in inputs]
        if len({spec.dtype for spec in specs}) > 1:
            raise CheckpointError(f"tensors {', '.join(inputs)} differ in type")
        try:
            results = apply([torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"tensor {inputs[0]} of shape {list(specs[0].shape)}: {error}") from None
        found |= {
            name: TensorSpec(tuple(result.shape), result.dtype)
            for name, result in zip(outputs, results, strict=True)
        }
    return found


def to_megatron(mapped: MappedSource, bad: list[NonFinite]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in the megatron format, one rule at a time; adds what is read and is not finite to `bad`."""
    for rule in mapped.rules:
        read = [_read(mapped.source, name, bad) for name in rule.hf]
        yield from zip(rule.megatron, rule.mapping.to_megatron(read), strict=True)


def to_hf(mapped: MappedSource, bad: list[NonFinite]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in the Hugging Face format, one rule at a time; one that both formats store in the same way
    comes in pieces along its first axis. Adds what is read and is not finite to `bad`."""
    for rule in mapped.rules:
        if isinstance(mapped.source, DistributedFolder) and isinstance(rule.mapping, Identity):
            row = 0
            for rows in mapped.source.rows(rule.megatron[0]):
                _check_finite(rule.megatron[0], rows, (row,) if rows.dim() else (), bad)
                row += len(rows) if rows.dim() else 0
                yield rule.hf[0], rows
            continue
        read = [_read(mapped.source, name, bad) for name in rule.megatron]
        yield from zip(rule.hf, rule.mapping.to_hf(read), strict=True)


def _read(source: TensorSource, name: str, bad: list[NonFinite]) -> Tensor:
    tensor = source.read(name)
    _check_finite(name, tensor, (), bad)
    return tensor


def _check_finite(name: str, tensor: Tensor, offsets: tuple[int, ...], bad: list[NonFinite]) -> None:
    if found := find_non_finite(name, tensor, offsets):
        bad.append(found)


def split_into_files(
    mapped: MappedSource, sizes: Mapping[str, TensorSpec], key: Callable[[Rule], Iterable[str]]
) -> list[MappedSource]:
    """Split a source by its rules, into about `FILE_BYTES` of output each; `key` gives the output names of a rule."""
    split: list[MappedSource] = []
    rules: list[Rule] = []
    total = 0
    for rule in mapped.rules:
        size = sum(sizes[name].nbytes for name in key(rule))
        if rules and total + size > FILE_BYTES:
            split.append(MappedSource(mapped.source, tuple(rules)))
            rules, total = [], 0
        rules.append(rule)
        total += size
    return [*split, MappedSource(mapped.source, tuple(rules))] if rules else split
