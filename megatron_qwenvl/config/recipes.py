"""Named recipes: functions that return a complete run configuration.

`stage1`, `stage2` and `stage3` carry the values of Table 8 of the Qwen-VL paper (arXiv 2308.12966) and the data
mixture of Tables 2 and 3; `tiny_stage1..3` are the same architecture small enough for a laptop. `qwen2_5_7b_stage1..3`
and `tiny_qwen2_stage1..3` are the same training stages with Qwen2.5's decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .schema import (
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    RuntimeConfig,
    SourceConfig,
    TrainConfig,
    VisionConfig,
)


def _mixture(samples: dict[str, float], chinese: tuple[str, ...] = ()) -> tuple[SourceConfig, ...]:
    """Sources whose weights are their sample counts (in millions), named after their directories."""
    return tuple(
        SourceConfig(name=name, path=name, weight=millions, language="zh" if name in chinese else "en")
        for name, millions in samples.items()
    )


GPUS = RuntimeConfig(device="cuda")
"""A rank that sees no GPU ends the run at once; with `auto` it would wait for the others on its CPU."""


def stage1() -> RunConfig:
    """Pre-training of ViT and adapter on image-text pairs at 224, decoder frozen."""
    mixture = {  # Table 2, millions of pairs after cleaning
        "laion_en": 280, "laion_coco": 300, "datacomp": 300, "coyo": 200, "cc12m": 8, "cc3m": 3,
        "sbu": 0.8, "coco_caption": 0.6, "laion_zh": 105, "in_house_zh": 220,
    }  # fmt: skip
    return RunConfig(
        name="stage1",
        stage="stage1",
        run_dir="runs/stage1",
        data=DataConfig(
            sources=_mixture(mixture, chinese=("laion_zh", "in_house_zh")),
            image_size=224,
            global_batch_size=30720,
            packing="isolated",
            max_sample_length=512,
            pack_length=4096,
        ),
        train=TrainConfig(steps=50_000, frozen=("decoder",), gradient_accumulation=6),
        optimizer=OptimizerConfig(lr=2e-4, min_lr=1e-6, warmup_steps=500, vit_layer_decay=0.95),
        runtime=GPUS,
    )


def stage2() -> RunConfig:
    """Multi-task pre-training of everything at 448 on interleaved sequences of 2048."""
    mixture = {  # Table 3, millions of samples
        "captioning": 19.7, "vqa": 3.6, "grounding": 3.5, "referring_grounding": 8.7,
        "grounded_captioning": 8.7, "ocr": 24.8, "pure_text": 7.8,
    }  # fmt: skip
    return RunConfig(
        name="stage2",
        stage="stage2",
        run_dir="runs/stage2",
        data=DataConfig(
            sources=_mixture(mixture),
            image_size=448,
            global_batch_size=4096,
            packing="interleaved",
            max_sample_length=2048,
            pack_length=2048,
        ),
        train=TrainConfig(steps=19_000, frozen=(), gradient_accumulation=8),
        optimizer=OptimizerConfig(lr=5e-5, min_lr=1e-5, warmup_steps=400, vit_layer_decay=0.95),
        parallel=ParallelConfig(tensor=2, sequence_parallel=True),
        runtime=GPUS,
    )


def stage3() -> RunConfig:
    """Supervised fine-tuning of adapter and decoder on dialogues at 448, ViT frozen."""
    return RunConfig(
        name="stage3",
        stage="stage3",
        run_dir="runs/stage3",
        data=DataConfig(
            sources=_mixture({"dialogues": 0.35}),
            image_size=448,
            global_batch_size=128,
            packing="isolated",
            max_sample_length=2048,
            pack_length=2048,
        ),
        train=TrainConfig(steps=8_000, frozen=("vit",), gradient_accumulation=8),
        optimizer=OptimizerConfig(lr=1e-5, min_lr=1e-6, warmup_steps=3000, vit_layer_decay=1.0),
        parallel=ParallelConfig(tensor=2, sequence_parallel=True),
        runtime=GPUS,
    )


TINY = ModelConfig(
    vision=VisionConfig(layers=2, width=128, heads=4, mlp_hidden=384, position_grid=2),
    adapter=AdapterConfig(query_grid=2, heads=4),
    decoder=DecoderConfig(layers=3, hidden=128, heads=4, ffn_hidden=384, vocab_size=512),
    init_std=0.09,
)
"""The same architecture with 1.3M parameters: 28 pixels are 2x2 patches, an image is 4 decoder tokens."""


def _tiny(
    base: RunConfig, data: dict[str, Any], train: dict[str, Any], optimizer: dict[str, Any]
) -> RunConfig:
    """A recipe of the same training stage with the tiny model, a laptop's data and fp32."""
    validation = tuple(source.model_copy(update={"path": f"val/{source.path}"}) for source in data["sources"])
    laptop = {
        "root": "data/demo",
        "validation_sources": validation,
        "max_sample_length": 256,
        "shuffle_window": 4,
        "workers": 1,
    }
    return base.model_copy(
        update={
            "name": f"tiny_{base.stage}",
            "run_dir": f"runs/tiny/{base.stage}",
            "model": TINY,
            "data": base.data.model_copy(update={**laptop, **data}),
            "train": base.train.model_copy(update={"precision": "fp32", "validation_samples": 256, **train}),
            "optimizer": base.optimizer.model_copy(update=optimizer),
            "parallel": ParallelConfig(),
            "runtime": RuntimeConfig(),
            "checkpoint": CheckpointConfig(interval=200, keep_last=2),
            "logging": LoggingConfig(interval=10),
        }
    )


def tiny_stage1() -> RunConfig:
    """Stage 1 for a laptop: captions over 28-pixel images."""
    return _tiny(
        stage1(),
        data={
            "sources": _mixture({"caption": 1.0}),
            "image_size": 28,
            "global_batch_size": 96,
            "pack_length": 1600,
        },
        train={"steps": 40, "validation_interval": 40},
        optimizer={"lr": 3e-4, "min_lr": 3e-5, "warmup_steps": 10},
    )


def tiny_stage2() -> RunConfig:
    """Stage 2 for a laptop: all tasks over 56-pixel images.

    Samples are packed isolated: from random weights and with a laptop's amount of data, sequences of interleaved
    samples learn several times more slowly.
    """
    return _tiny(
        stage2(),
        data={
            "sources": _mixture({"caption": 1.5, "vqa": 3.0, "grounding": 0.5, "ocr": 0.15, "text": 0.1}),
            "image_size": 56,
            "global_batch_size": 96,
            "packing": "isolated",
            "pack_length": 1600,
        },
        train={"steps": 550, "validation_interval": 110},
        optimizer={"lr": 5e-4, "min_lr": 3e-5, "warmup_steps": 20},
    )


def tiny_stage3() -> RunConfig:
    """Stage 3 for a laptop: dialogues, and some plain questions so that their form is not forgotten."""
    return _tiny(
        stage3(),
        data={
            "sources": _mixture({"chat": 1.0, "vqa": 0.5}),
            "image_size": 56,
            "global_batch_size": 64,
            "pack_length": 1600,
        },
        train={"steps": 60, "validation_interval": 60},
        optimizer={"lr": 1e-4, "min_lr": 1e-5, "warmup_steps": 10},
    )


QWEN2_5_7B = ModelConfig(
    adapter=AdapterConfig(heads=28),
    decoder=DecoderConfig(
        family="qwen2",
        layers=28,
        hidden=3584,
        heads=28,
        query_groups=4,
        ffn_hidden=18944,
        vocab_size=152064,
        rotary_base=1_000_000,
        norm_eps=1e-6,
    ),
)
"""Qwen-VL with Qwen2.5-7B as the decoder (its `config.json`); the adapter has heads of 128 channels, as published."""

TINY_QWEN2 = TINY.model_copy(
    update={
        "adapter": AdapterConfig(query_grid=2, heads=4),
        "decoder": DecoderConfig(
            family="qwen2",
            layers=3,
            hidden=112,
            heads=14,
            query_groups=2,
            ffn_hidden=592,
            vocab_size=512,
            rotary_base=1_000_000,
        ),
    }
)
"""The proportions of Qwen2.5-7B's decoder (7 heads a group, MLP 5.3 times as wide) at 1/32 of its width."""


def _with_model(base: RunConfig, model: ModelConfig, prefix: str) -> RunConfig:
    """A recipe of the same training stage with another model."""
    update = {"name": f"{prefix}_{base.stage}", "run_dir": f"runs/{prefix}/{base.stage}", "model": model}
    return base.model_copy(update=update)


def qwen2_5_7b_stage1() -> RunConfig:
    """Stage 1 with Qwen2.5-7B as the decoder."""
    return _with_model(stage1(), QWEN2_5_7B, "qwen2_5_7b")


def qwen2_5_7b_stage2() -> RunConfig:
    """Stage 2 with Qwen2.5-7B as the decoder."""
    return _with_model(stage2(), QWEN2_5_7B, "qwen2_5_7b")


def qwen2_5_7b_stage3() -> RunConfig:
    """Stage 3 with Qwen2.5-7B as the decoder."""
    return _with_model(stage3(), QWEN2_5_7B, "qwen2_5_7b")


def tiny_qwen2_stage1() -> RunConfig:
    """Stage 1 for a laptop with a small decoder of Qwen2.5's kind."""
    return _with_model(tiny_stage1(), TINY_QWEN2, "tiny_qwen2")


def tiny_qwen2_stage2() -> RunConfig:
    """Stage 2 for a laptop with a small decoder of Qwen2.5's kind."""
    return _with_model(tiny_stage2(), TINY_QWEN2, "tiny_qwen2")


def tiny_qwen2_stage3() -> RunConfig:
    """Stage 3 for a laptop with a small decoder of Qwen2.5's kind."""
    return _with_model(tiny_stage3(), TINY_QWEN2, "tiny_qwen2")


RECIPES: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function
    for function in (
        *(stage1, stage2, stage3, tiny_stage1, tiny_stage2, tiny_stage3),
        *(qwen2_5_7b_stage1, qwen2_5_7b_stage2, qwen2_5_7b_stage3),
        *(tiny_qwen2_stage1, tiny_qwen2_stage2, tiny_qwen2_stage3),
    )
}
