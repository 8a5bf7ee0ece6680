"""The demo's data: what the records say is what the images show, and nothing else tells it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image, ImageChops

from megatron_qwenvl.data.records.tasks import TASKS
from megatron_qwenvl.data.shards.index import load_index
from megatron_qwenvl.data.shards.indexing import IndexJob, index_directory
from megatron_qwenvl.data.shards.listing import list_shards
from megatron_qwenvl.demo.dataset import SOURCES, TEST_TASKS, balanced_vqa, make_demo_data
from megatron_qwenvl.demo.records import POSSIBLE_ANSWERS, QUESTIONS, TASK_MAKERS, answer
from megatron_qwenvl.demo.scenes import COLORS, Scene, draw, shape_scene, text_scene
from tests.unit.data.test_tools import run_tool

pytestmark = pytest.mark.slow

PARTS = [*SOURCES, *(f"val/{source}" for source in SOURCES), *(f"test/{task}" for task in TEST_TASKS)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    make_demo_data(out, train=400, held_out=40, seed=1)
    return out


def members(directory: Path) -> list[tuple[str, bytes]]:
    found = []
    for path in list_shards(directory):
        with tarfile.open(path) as tar:
            found += [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    return found


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(data) for name, data in members(directory) if name.endswith(".json")]


def test_every_sample_can_be_used(demo: Path) -> None:
    counts = {}
    for part in PARTS:
        results = index_directory(demo / part, IndexJob(verify_images=True))
        assert not [result.error for result in results if result.error]
        indices = [load_index(path) for path in list_shards(demo / part)]
        assert not [reason for index in indices for reason in index.arrays["skipped_reasons"]]
        counts[part] = sum(len(index.arrays["keys"]) for index in indices)
    assert counts == {part: round(400 * SOURCES[part][1]) if part in SOURCES else 40 for part in PARTS}
    assert len(list_shards(demo / "vqa")) == 4


def test_all_tasks_in_english_and_chinese(demo: Path) -> None:
    chinese, tasks = set(), set()
    for source in SOURCES:
        for record in records(demo / source):
            tasks.add(record["task"])
            if any(ord(character) > 0x2E80 for character in json.dumps(record, ensure_ascii=False)):
                chinese.add(record["task"])
    assert tasks == set(TASKS)
    assert chinese == tasks - {"ocr"}  # numbers have no language


def test_equal_seeds_give_equal_files_and_other_seeds_others(demo: Path, tmp_path: Path) -> None:
    def digests(out: Path) -> dict[str, str]:
        tars = sorted(out.rglob("*.tar"))
        return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in tars}

    make_demo_data(tmp_path / "same", train=400, held_out=40, seed=1)
    make_demo_data(tmp_path / "other", train=400, held_out=40, seed=2)
    assert digests(tmp_path / "same") == digests(demo)
    assert not set(digests(tmp_path / "other").values()) & set(digests(demo).values())


def test_held_out_images_are_not_in_the_training_data(demo: Path) -> None:
    def images(parts: list[str]) -> set[bytes]:
        return {data for part in parts for name, data in members(demo / part) if name.endswith("png")}

    trained, held_out = images(list(SOURCES)), images(PARTS[len(SOURCES) :])
    assert len(held_out) > 200
    assert not trained & held_out


def test_a_second_run_leaves_no_shard_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "vqa").mkdir()
    (tmp_path / "vqa" / "00009.tar").write_bytes(b"left over")
    make_demo_data(tmp_path, train=100, held_out=1, seed=0)
    assert [path.name for path in list_shards(tmp_path / "vqa")] == [f"0000{i}.tar" for i in range(4)]


def test_answers_are_what_the_image_shows() -> None:
    rng = Random(0)
    for _ in range(50):
        scene = shape_scene(rng)
        (figure,), image = scene.figures, draw(scene)
        inside = image.getpixel((round(figure.x), round(figure.y + figure.radius / 4)))
        assert inside == COLORS[answer("color", scene, "en")]
        row, column = answer("place", scene, "en").split()
        assert (row == "bottom", column == "right") == (
            figure.y > scene.height / 2,
            figure.x > scene.width / 2,
        )


def test_boxes_and_quads_enclose_what_is_drawn() -> None:
    rng = Random(0)
    for _ in range(20):
        scene = shape_scene(rng, figures=2)
        for figure in scene.figures:
            _same_box(_changed_box(scene, figures=tuple(f for f in scene.figures if f != figure)), figure.box)
        lines = text_scene(rng)
        for line in lines.texts:
            (x1, y1), _, (x2, y2), _ = line.quad
            _same_box(_changed_box(lines, texts=tuple(t for t in lines.texts if t != line)), (x1, y1, x2, y2))


def _changed_box(scene: Scene, **without: Any) -> tuple[int, int, int, int]:
    """Where an image changes when something is left out of it."""
    box = ImageChops.difference(draw(scene), draw(replace(scene, **without))).getbbox()
    assert box
    return box


def _same_box(found: tuple[float, ...], expected: tuple[float, ...]) -> None:
    # A star's points and a triangle's do not reach all sides of its square, so boxes may be larger by a fifth.
    slack = 0.2 * (expected[2] - expected[0])
    assert all(-2 <= outer <= slack for outer in (
        found[0] - expected[0], found[1] - expected[1], expected[2] - found[2], expected[3] - found[3]
    ))  # fmt: skip


def test_nothing_but_the_image_tells_the_answer() -> None:
    """Over many samples the most frequent answer to each question is close to 1 / (number of answers)."""
    rng = Random(0)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for record, _ in (TASK_MAKERS["vqa"](rng) for _ in range(4000)):
        answers[record["question"]][record["answer"]] += 1
    assert {question: set(counts) for question, counts in answers.items()} == {
        question: set(possible) for asked in POSSIBLE_ANSWERS.values() for question, possible in asked.items()
    }
    for counts in answers.values():
        assert counts.most_common(1)[0][1] / counts.total() < 1.6 / len(counts)


@pytest.mark.parametrize("task", POSSIBLE_ANSWERS)
def test_test_questions_are_balanced_exactly(task: str) -> None:
    expected = POSSIBLE_ANSWERS[task]
    asked = islice(balanced_vqa(task, Random(0)), len(expected) * 60)
    questions = Counter((record["question"], record["answer"]) for record, _ in asked)
    assert len(questions) == sum(len(possible) for possible in expected.values())
    for question, possible in expected.items():
        assert {questions[question, answer] for answer in possible} == {60 // len(possible)}


def test_every_question_belongs_to_one_task() -> None:
    assert sum(len(asked) for asked in POSSIBLE_ANSWERS.values()) == 2 * len(QUESTIONS)


def test_images_are_varied(demo: Path) -> None:
    images = [Image.open(io.BytesIO(data)) for name, data in members(demo / "vqa") if name.endswith("png")]
    assert len({image.size for image in images}) == 4
    assert len({image.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--out", "{tmp}/demo", "--train", "5"], 2, "at least 100, found '5'"),
        (["--out", "{tmp}/file/demo"], 1, "cannot write the data"),
        (["--out", "{tmp}/demo", "--train", "100", "--held_out", "100"], 0, ""),
    ],
)
def test_tool(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    (tmp_path / "file").write_text("")
    result = run_tool("make_demo_data.py", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (result.returncode, "Traceback" in result.stderr) == (code, False), result.stderr
    assert message in result.stderr
    assert code or all(list_shards(tmp_path / "demo" / part) for part in PARTS)
