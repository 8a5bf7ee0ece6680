"""Eight steps of a training stage by the product, and the same by the plain recipe."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_qwenvl.checkpoint.formats.names import TABLE_NAME, qwenvl_rules
from megatron_qwenvl.config.load import load_config
from megatron_qwenvl.config.schema import ModelConfig, RunConfig
from megatron_qwenvl.data.loading.loader import build_loader
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.model.build import named_tensors
from megatron_qwenvl.model.stage import QwenVLStage
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.training.loop import Trainer
from tests.distributed.harness import run_ranks
from tests.distributed.model_cases import assemble
from tests.end_to_end.training_cases import records
from tests.reference_model import ReferenceModel
from tests.unit.data.data_cases import write_source

from .plain_samples import Example, examples, tokens_of
from .plain_training import Pack, Recipe, Trained, is_decoder, is_vit, train


@dataclass(frozen=True)
class Stage:
    """A stage in small: its numbers, its tasks and what else differs from the tiny recipe."""

    recipe: Recipe
    tasks: tuple[str, ...]
    image_size: int
    interleaved: bool = False
    overrides: tuple[str, ...] = ()


STEPS, WARMUP = 8, 3
_NUMBERS = Recipe(
    frozen=lambda name: False, steps=STEPS, warmup=WARMUP, peak=2e-3, floor=4e-4, layer_decay=0.7,
    weight_decay=0.3, clip=1.0,
)  # fmt: skip
STAGES = {
    "stage1": Stage(replace(_NUMBERS, frozen=is_decoder, clip=0.25), ("caption",), image_size=28),
    "stage1_rows": Stage(  # Table 8's gradient accumulation: micro-batches of padded rows
        replace(_NUMBERS, frozen=is_decoder, clip=0.25),
        ("caption",),
        image_size=28,
        overrides=(
            *("--data.packing", "none", "--train.gradient_accumulation", "3"),
            *("--data.max_sample_length", "128"),
        ),
    ),
    "stage2": Stage(
        replace(_NUMBERS, clip=1.3),
        ("caption", "vqa", "referring", "text"),
        image_size=56,
        interleaved=True,
        overrides=("--data.packing", "interleaved"),
    ),
    "stage3": Stage(
        replace(_NUMBERS, frozen=is_vit, clip=1.2, layer_decay=1.0), ("chat", "text"), image_size=56
    ),
}
MODEL = {
    # Large and different epsilons, so that a norm with another one shows.
    "vision": {"layers": 3, "width": 32, "mlp_hidden": 48, "norm_eps": 0.02},
    "adapter": {"norm_eps": 0.003},
    "decoder": {"layers": 2, "hidden": 48, "ffn_hidden": 64, "norm_eps": 0.05},
}


def make_config(stage: str, root: Path, run_dir: Path, *overrides: str, world: int = 1) -> RunConfig:
    """The tiny recipe of the stage with the numbers of `STAGES` on the data below `root`."""
    small, recipe = STAGES[stage], STAGES[stage].recipe
    model = [
        word
        for part, fields in MODEL.items()
        for name, value in fields.items()
        for word in (f"--model.{part}.{name}", str(value))
    ]
    arguments = [
        "--run_dir", str(run_dir),
        "--data.root", str(root),
        "--data.sources", f"[{{name: {stage}, path: {stage}}}]",
        "--data.global_batch_size", "12",
        "--data.pack_length", "256",
        "--data.image_size", str(small.image_size),
        "--data.workers", "0",
        "--train.steps", str(recipe.steps),
        "--train.stop_after", str(recipe.steps),
        "--train.clip_grad", str(recipe.clip),
        "--train.validation_interval", "0",
        "--optimizer.lr", str(recipe.peak),
        "--optimizer.min_lr", str(recipe.floor),
        "--optimizer.warmup_steps", str(recipe.warmup),
        "--optimizer.weight_decay", str(recipe.weight_decay),
        "--optimizer.vit_layer_decay", str(recipe.layer_decay),
        "--checkpoint.save", "false",
        "--logging.tensorboard", "false", "--logging.interval", "1",
        *model, *small.overrides, *overrides,
    ]  # fmt: skip
    return load_config(f"tiny_{stage.partition('_')[0]}", arguments, world_size=world)


def write_examples(stage: str, root: Path) -> list[Example]:
    """The stage's data, stored and indexed below `root`."""
    made = examples(STAGES[stage].tasks, count=40, seed=5)
    write_source(root / stage, [example.stored() for example in made], per_shard=16)
    return made


@dataclass
class Result:
    """What the product did: records of the steps, weights before and after by checkpoint key."""

    steps: list[dict[str, Any]]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def run_product(config: RunConfig, ranks: int = 1) -> Result:
    """Run a stage from fresh weights to its end on gloo ranks."""
    results = run_ranks(ranks, _train, config)
    before, after = (assemble([shard for rank in results for shard in rank[i]]) for i in (0, 1))
    return Result(records(Path(config.run_dir)), before, after)


def _train(process: ProcessInfo, config: RunConfig) -> tuple[list[Any], list[Any]]:
    trainer = Trainer.build(config, start_engine(config, process))
    stage = trainer.runner.model.module
    before = _shards(stage)
    trainer.run()
    return before, _shards(stage)


def _shards(stage: QwenVLStage) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]:
    return [
        (key, part.global_shape, part.global_offset, part.data.detach().clone())
        for key, part in named_tensors(stage)
    ]


def run_plain(
    stage: str,
    config: RunConfig,
    made: list[Example],
    start: dict[str, Tensor],
    recipe: Recipe | None = None,
) -> Trained:
    """The plain recipe (none: the stage's) on the samples of every step, from the given weights."""
    model = ReferenceModel(config.model)
    model.load_state_dict(as_hf(start, config.model))
    return train(model, packs_of(config, made), recipe or STAGES[stage].recipe, STAGES[stage].interleaved)


def packs_of(config: RunConfig, made: list[Example]) -> list[list[Pack]]:
    """The samples of every micro-batch of every step; which they are is the data plan's to say."""
    tokens = {
        example.key: tokens_of(example, config.model.image_tokens, config.data.image_size) for example in made
    }
    steps = []
    for step in build_loader(config):
        keys = iter([name.rpartition(":")[2] for name in step.sample_names()])
        steps.append([[tokens[key] for key in itertools.islice(keys, b.num_samples)] for b in step])
    return steps


def as_hf(weights: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Weights by checkpoint key under the names and in the shapes of the Hugging Face format."""
    hf = {TABLE_NAME: ReferenceModel(model).state_dict()[TABLE_NAME]}
    for rule in qwenvl_rules(model):
        values = rule.mapping.to_hf([weights[name] for name in rule.megatron])
        hf.update(zip(rule.hf, values, strict=True))
    return hf
