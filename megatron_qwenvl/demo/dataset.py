"""The demo's data set: drawn images with records of every task, as WebDataset shards.

DIR/<source>/00000.tar ..           training: caption, vqa, grounding, ocr, text, chat
DIR/val/<source>/00000.tar          the same sources, held out, for validation
DIR/test/<task>/00000.tar           held-out questions: vqa, ocr_vqa (balanced answers), referring, caption
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from random import Random

import webdataset

from megatron_qwenvl.runtime.listing import matching_entries

from .records import POSSIBLE_ANSWERS, TASK_MAKERS, Drawn, vqa
from .scenes import Scene, draw

SOURCES: dict[str, tuple[tuple[str, ...], float]] = {
    "caption": (("caption",), 0.2),
    "vqa": (("vqa",), 0.4),
    "grounding": (("grounded_caption", "referring", "region_caption"), 0.15),
    "ocr": (("ocr",), 0.05),
    "text": (("text",), 0.02),
    "chat": (("chat",), 0.18),
}
"""Tasks of every source and the source's share of the training samples."""
TEST_TASKS = ("vqa", "ocr_vqa", "referring", "caption")
_TRAINING_SHARDS = 4


def make_demo_data(
    out: Path,
    train: int,
    held_out: int,
    seed: int,
    on_subset: Callable[[str, int], None] = lambda subset, count: None,
) -> None:
    """Write the whole data set; the same arguments give the same bytes.

    Args:
        out: directory to write to; shards of the same names are overwritten.
        train: training samples over all sources.
        held_out: validation samples of every source, and test samples of every task.
        seed: seed of everything that is drawn.
        on_subset: told the directory and the number of samples of each subset when it is written.

    Raises:
        OSError: the directory cannot be written.
    """
    for subset, samples, count in _subsets(train, held_out, seed):
        shards = _TRAINING_SHARDS if "/" not in subset else 1
        _write_subset(out / subset, islice(samples, count), samples_per_shard=-(-count // shards))
        on_subset(subset, count)


def _subsets(train: int, held_out: int, seed: int) -> Iterator[tuple[str, Iterator[Drawn], int]]:
    """Directory, endless samples, and number of samples of every subset, each with random numbers of its own."""
    for source, (tasks, share) in SOURCES.items():
        yield source, _endless(tasks, Random(f"{seed}/{source}")), round(train * share)
        yield f"val/{source}", _endless(tasks, Random(f"{seed}/val/{source}")), held_out
    for task in TEST_TASKS:
        rng = Random(f"{seed}/test/{task}")
        yield (
            f"test/{task}",
            balanced_vqa(task, rng) if task in POSSIBLE_ANSWERS else _endless((task,), rng),
            held_out,
        )


def _endless(tasks: tuple[str, ...], rng: Random) -> Iterator[Drawn]:
    for task in cycle(tasks):
        yield TASK_MAKERS[task](rng)


def balanced_vqa(task: str, rng: Random) -> Iterator[Drawn]:
    """Endless questions of `vqa` or `ocr_vqa`: every question in turn, and every answer to a question in turn."""
    answers = {question: cycle(possible) for question, possible in POSSIBLE_ANSWERS[task].items()}
    for question in cycle(answers):
        wanted = (question, next(answers[question]))
        record, scenes = vqa(rng)
        while (record["question"], record["answer"]) != wanted:
            record, scenes = vqa(rng)
        yield record, scenes


def _write_subset(directory: Path, samples: Iterable[Drawn], samples_per_shard: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for old in matching_entries(directory, "*.tar"):
        old.unlink()
    pattern = str(directory / "%05d.tar")
    # Fixed times and owners: equal data gives equal files.
    with webdataset.ShardWriter(pattern, maxcount=samples_per_shard, verbose=0, mtime=0.0) as shards:
        for number, (record, scenes) in enumerate(samples):
            names = [f"{i}.png" for i in range(len(scenes))] if len(scenes) > 1 else ["png"] * len(scenes)
            images = {name: _png(scene) for name, scene in zip(names, scenes, strict=True)}
            shards.write({"__key__": f"{number:06d}", **images, "json": record})


def _png(scene: Scene) -> bytes:
    file = io.BytesIO()
    draw(scene).save(file, "PNG")
    return file.getvalue()
