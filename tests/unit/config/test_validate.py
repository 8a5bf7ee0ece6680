"""Every contradiction is found, alone, and says what was expected and what was found."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_qwenvl.config.fields import plain
from megatron_qwenvl.config.load import load_config
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.config.validate import find_problems

SOURCE = {"name": "a", "path": "a"}


# What the cases below count on, whatever the recipe is tuned to.
FIXED = {
    "model.vision.layers": 4,
    "model.decoder.layers": 4,
    "model.adapter.query_grid": 4,
    "data.image_size": 56,
    "data.global_batch_size": 32,
    "data.pack_length": 1024,
    "train.steps": 100,
    "optimizer.lr": 2e-3,
    "optimizer.min_lr": 2e-4,
    "optimizer.warmup_steps": 20,
}

GROUPED = {"model.decoder.family": "qwen2", "model.decoder.query_groups": 2}


def changed(recipe: str, changes: dict[str, Any]) -> RunConfig:
    """The recipe with changed fields, valid one by one but not checked against each other."""
    tree = plain(load_config(recipe))
    for path, value in {**FIXED, **changes}.items():
        *sections, name = path.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[name] = value
    return RunConfig.model_validate(tree)


CONTRADICTIONS = [
    ({"data.skip_steps": [[5, 3]]}, "data.skip_steps: expected [a, b] with 0 <= a <= b, found [5, 3]"),
    ({"data.skip_steps": [[-1, 3]]}, "data.skip_steps: expected [a, b] with 0 <= a <= b, found [-1, 3]"),
    (
        {"data.skip_steps": [[7, 9], [1, 7]]},
        "data.skip_steps: expected ranges that do not overlap, found [1, 7] and [7, 9]",
    ),
    (
        {"model.vision.width": 130},
        "model.vision.width: expected a multiple of model.vision.heads (4), found 130",
    ),
    (
        {"model.adapter.heads": 3},
        "model.decoder.hidden: expected a multiple of model.adapter.heads (3), found 128",
    ),
    (
        {"model.decoder.hidden": 12, "model.decoder.heads": 4},
        "model.decoder.hidden: expected a multiple of 2 x model.decoder.heads (8), because rotary positions need "
        "an even head size, found 12",
    ),
    (
        {"model.decoder.hidden": 6, "model.decoder.heads": 3, "model.adapter.heads": 3},
        "model.decoder.hidden: expected a multiple of 4 for the adapter's 2-D positions, found 6",
    ),
    (
        {"model.vision.heads": 1, "parallel.tensor": 2},
        "model.vision.heads: expected a multiple of parallel.tensor (2), found 1; "
        "this model can have parallel.tensor 1",
    ),
    (
        {"model.adapter.heads": 1, "parallel.tensor": 2},
        "model.adapter.heads: expected a multiple of parallel.tensor (2), found 1; "
        "this model can have parallel.tensor 1",
    ),
    (
        {"model.decoder.heads": 1, "parallel.tensor": 2},
        "model.decoder.heads: expected a multiple of parallel.tensor (2), found 1; "
        "this model can have parallel.tensor 1",
    ),
    (
        {**GROUPED, "parallel.tensor": 4},
        "model.decoder.query_groups: expected a multiple of parallel.tensor (4), found 2; this model can have "
        "parallel.tensor 1 or 2",
    ),
    (
        {**GROUPED, "model.decoder.query_groups": 3},
        "model.decoder.heads: expected a multiple of model.decoder.query_groups (3), found 4",
    ),
    (
        {"model.decoder.query_groups": 2},
        "model.decoder.query_groups: expected none or model.decoder.heads (4) with model.decoder.family qwen, found 2",
    ),
    (
        {"model.vision.mlp_hidden": 383, "parallel.tensor": 2},
        "model.vision.mlp_hidden: expected a multiple of parallel.tensor (2), found 383; "
        "this model can have parallel.tensor 1",
    ),
    (
        {"model.decoder.ffn_hidden": 383, "parallel.tensor": 2},
        "model.decoder.ffn_hidden: expected a multiple of parallel.tensor (2), found 383; "
        "this model can have parallel.tensor 1",
    ),
    (
        {"model.decoder.vocab_size": 511, "parallel.tensor": 2},
        "model.decoder.vocab_size: expected a multiple of parallel.tensor (2), found 511; "
        "this model can have parallel.tensor 1",
    ),
    (
        {"parallel.sequence_parallel": True},
        "parallel.sequence_parallel: expected parallel.tensor > 1 to shard sequences over, found 1",
    ),
    (
        {"runtime.device": "cpu", "runtime.kernels": "te"},
        "runtime.kernels: expected auto or torch with runtime.device cpu, found te",
    ),
    (
        {"parallel.pipeline": 16, "parallel.tensor": 1},
        "parallel.pipeline: expected at most the number of layers of the model (12), found 16",
    ),
    (
        {"parallel.pipeline": 4, "parallel.layout": [3, 5]},
        "parallel.layout: expected parallel.pipeline - 1 = 3 first layers of the later pipeline stages, "
        "found 2: [3, 5]",
    ),
    (
        {"parallel.pipeline": 4, "parallel.layout": [3, 5, 5]},
        "parallel.layout: expected strictly increasing layer indices, found [3, 5, 5]",
    ),
    (
        {"parallel.pipeline": 4, "parallel.layout": [3, 5, 12]},
        "parallel.layout: expected layer indices from 1 to 11, found [3, 5, 12]",
    ),
    (
        {"parallel.pipeline": 2, "parallel.layout": [0]},
        "parallel.layout: expected layer indices from 1 to 11, found [0]",
    ),
    (
        {"parallel.tensor": 2, "parallel.pipeline": 3},
        "parallel.tensor, parallel.pipeline: expected a number of processes that is a multiple of 2 x 3 = 6, found 16",
    ),
    (
        {"data.global_batch_size": 15},
        "data.global_batch_size: expected at least one sample for each of 16 data-parallel ranks, found 15",
    ),
    (
        {"data.packing": "none", "data.global_batch_size": 64, "train.gradient_accumulation": 3},
        "data.global_batch_size: expected a multiple of data-parallel size x train.gradient_accumulation = 16 x 3, "
        "found 64",
    ),
    (
        {"data.image_size": 60},
        "data.image_size: expected a multiple of model.vision.patch_size (14), found 60",
    ),
    (
        {"data.image_size": 42, "parallel.sequence_parallel": True, "parallel.tensor": 2},
        "data.image_size: expected a number of patches that is a multiple of parallel.tensor (2) with "
        "parallel.sequence_parallel, found 9",
    ),
    (
        {"data.max_sample_length": 17},
        "data.max_sample_length: expected at least the 18 tokens of one image (model.adapter.query_grid^2 + 2), "
        "found 17",
    ),
    (
        {"data.pack_length": 255},
        "data.pack_length: expected at least data.max_sample_length (256), found 255",
    ),
    (
        {"data.pack_length": 1023, "parallel.sequence_parallel": True, "parallel.tensor": 2},
        "data.pack_length: expected a multiple of parallel.tensor (2), found 1023",
    ),
    (
        {"data.packing": "none", "train.gradient_accumulation": 1, "data.max_sample_length": 255}
        | {"parallel.sequence_parallel": True, "parallel.tensor": 2},
        "data.max_sample_length: expected a multiple of parallel.tensor (2), found 255",
    ),
    ({"data.sources": []}, "data.sources: expected at least one source, found none"),
    ({"data.sources": [SOURCE, SOURCE]}, "data.sources: expected unique names, found 'a' 2 times"),
    (
        {"data.validation_sources": [SOURCE, SOURCE]},
        "data.validation_sources: expected unique names, found 'a' 2 times",
    ),
    (
        {"train.frozen": ["adapter", "vit", "decoder"]},
        "train.frozen: expected a part that is left to train, found ['adapter', 'vit', 'decoder']",
    ),
    ({"train.stop_after": 101}, "train.stop_after: expected at most train.steps (100), found 101"),
    (
        {"checkpoint.save": False},
        "checkpoint.save: expected true without train.stop_after, because nothing of the run is kept, found false",
    ),
    (
        {"optimizer.warmup_steps": 100},
        "optimizer.warmup_steps: expected fewer than train.steps (100), found 100",
    ),
    ({"optimizer.min_lr": 0.01}, "optimizer.min_lr: expected at most optimizer.lr (0.002), found 0.01"),
]


@pytest.mark.parametrize(
    ("changes", "message"), CONTRADICTIONS, ids=[m.split(",")[0][:70] for _, m in CONTRADICTIONS]
)
def test_a_contradiction_is_named(changes: dict[str, Any], message: str) -> None:
    assert find_problems(changed("tiny_stage1", changes), world_size=16) == [message]


FINE: list[dict[str, Any]] = [
    {"train.frozen": ["vit", "decoder", "adapter_output"]},  # the adapter's attention is left to train
    {"train.frozen": ["vit", "decoder"], "optimizer.vit_layer_decay": 0.5},  # pointless, not wrong
    {"train.stop_after": 100},
    {"train.stop_after": 100, "checkpoint.save": False},
    {"optimizer.min_lr": 0.002},
    {"data.packing": "none", "train.gradient_accumulation": 2, "data.pack_length": 8},
    {"data.max_sample_length": 18},
    {"parallel.pipeline": 2, "parallel.layout": [11]},
    {"parallel.tensor": 4, "parallel.pipeline": 4, "parallel.sequence_parallel": True},
    {"data.sources": [SOURCE], "data.validation_sources": [SOURCE]},
]


@pytest.mark.parametrize("changes", FINE)
def test_what_fits_is_not_reported(changes: dict[str, Any]) -> None:
    assert find_problems(changed("tiny_stage1", changes), world_size=16) == []


def test_without_a_world_size_nothing_is_said_about_it() -> None:
    config = changed(
        "tiny_stage1", {"parallel.tensor": 2, "parallel.pipeline": 3, "data.global_batch_size": 1}
    )
    assert find_problems(config, world_size=None) == []
    assert len(find_problems(config, world_size=4)) == 1


def test_all_contradictions_are_reported_together() -> None:
    config = changed("tiny_stage1", {"data.image_size": 60, "train.stop_after": 101, "parallel.tensor": 3})
    fields = [problem.split(":")[0] for problem in find_problems(config, world_size=4)]
    assert {
        "data.image_size",
        "train.stop_after",
        "model.vision.heads",
        "parallel.tensor, parallel.pipeline",
    } <= {*fields}
