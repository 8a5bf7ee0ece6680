"""Makes small data sets for the tests, through webdataset as users do."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

from megatron_qwenvl.config.schema import (
    AdapterConfig,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from megatron_qwenvl.data.records.tasks import TASKS
from megatron_qwenvl.data.shards.indexing import IndexJob, index_directory

Sample = dict[str, Any]
WORDS = "red green blue circle square below above three small large with and the".split()


def png_image(width: int = 20, height: int = 10, colour: tuple[int, int, int] = (200, 30, 60)) -> bytes:
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def sample(key: str, record: Sample | bytes, **members: bytes) -> Sample:
    """A webdataset sample; `_` in a member's name stands for a dot (`_0_png` is `0.png`)."""
    files = {name.strip("_").replace("_", "."): data for name, data in members.items()}
    text = record if isinstance(record, bytes) else json.dumps(record, ensure_ascii=False).encode()
    return {"__key__": key, "json": text, **files}


def write_shard(path: Path, samples: list[Sample]) -> Path:
    """Write a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for item in samples:
            writer.write(item)
    return path


def write_source(
    directory: Path, samples: list[Sample], per_shard: int = 10, tokenizer: str | None = None
) -> Path:
    """Write and index the shards of a source."""
    for number, first in enumerate(range(0, len(samples), per_shard)):
        write_shard(directory / f"{number:06d}.tar", samples[first : first + per_shard])
    index_directory(directory, IndexJob(tokenizer))
    return directory


def words(rng: random.Random, most: int) -> str:
    """A text of 1 to `most` words."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def random_record(task: str, rng: random.Random) -> Sample:
    """A record of a task over a 20x10 image."""
    box, quad = [2, 1, 12, 8], [[2, 1], [12, 1], [12, 8], [2, 8]]
    records: dict[str, Sample] = {
        "caption": {"caption": words(rng, 20), "language": rng.choice(["en", "zh"])},
        "vqa": {"question": words(rng, 8) + "?", "answer": words(rng, 2)},
        "ocr_vqa": {"question": words(rng, 8) + "?", "answer": words(rng, 2)},
        "grounded_caption": {
            "caption": [words(rng, 4), {"ref": words(rng, 2), "boxes": [box]}, words(rng, 4)]
        },
        "referring": {"phrase": words(rng, 3), "boxes": [box]},
        "region_caption": {"box": box, "caption": words(rng, 5)},
        "ocr": {"lines": [{"text": words(rng, 1), "quad": quad}]},
        "text": {"text": words(rng, 40)},
        "chat": {
            "conversations": [
                {"from": "user", "value": f"Picture 1: <img>png</img>\n{words(rng, 5)}?"},
                {"from": "assistant", "value": words(rng, 5)},
            ]
        },
    }
    return {"task": task, **records[task]}


def mixed_samples(count: int, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> list[Sample]:
    """Samples of all tasks in turn, each over an image of its own colour."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        task = tasks[number % len(tasks)]
        record = random_record(task, rng)
        members = {} if task == "text" else {"png": png_image(colour=(number % 256, number // 256 % 256, 77))}
        made.append(sample(f"{number:05d}", record, **members))
    return made


def run_config(root: Path, sources: dict[str, float], **data: Any) -> RunConfig:
    """A small run over directories below `root`; images are 16 tokens."""
    settings: dict[str, Any] = {
        "image_size": 28,
        "global_batch_size": 24,
        "max_sample_length": 256,
        "pack_length": 512,
        "shuffle_window": 2,
        "workers": 0,
        **data,
    }
    return RunConfig(
        model=ModelConfig(adapter=AdapterConfig(query_grid=4), decoder=DecoderConfig(vocab_size=512)),
        data=DataConfig(
            root=str(root),
            sources=tuple(
                SourceConfig(name=name, path=name, weight=weight) for name, weight in sources.items()
            ),
            **settings,
        ),
        train=TrainConfig(steps=1000, gradient_accumulation=3),
    )
