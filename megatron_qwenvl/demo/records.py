"""Records over drawn images: the seven task formats and ChatML dialogues, in English and Chinese.

The answer is independent of everything but the image (see `scenes.py`), and every kind of
question is asked equally often, so that an answer without a look at the image is right by chance only.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from .scenes import DIGITS, QUARTERS, Figure, Scene, shape_scene, text_scene

SampleRecord = dict[str, Any]
Drawn = tuple[SampleRecord, tuple[Scene, ...]]
"""A record and the scenes of its images."""

CHINESE_SHARE = 0.25
_SHAPES = {"circle": "圆", "square": "方", "triangle": "三角", "star": "星"}
_COLORS = {"red": "红", "green": "绿", "blue": "蓝", "yellow": "黄", "purple": "紫", "black": "黑"}
_QUARTERS = ("左上", "右上", "左下", "右下")

QUESTIONS: dict[str, dict[str, str]] = {
    "color": {"en": "What color?", "zh": "颜色？"},
    "shape": {"en": "What shape?", "zh": "形状？"},
    "place": {"en": "Where is it?", "zh": "位置？"},
    "digit": {"en": "What digit?", "zh": "数字？"},
}
"""Questions about an image with one shape and one digit."""

_ANSWERS: dict[str, dict[str, tuple[str, ...]]] = {
    "color": {"en": tuple(_COLORS), "zh": tuple(_COLORS.values())},
    "shape": {"en": tuple(_SHAPES), "zh": tuple(_SHAPES.values())},
    "place": {"en": QUARTERS, "zh": _QUARTERS},
    "digit": {"en": tuple(DIGITS), "zh": tuple(DIGITS)},
}
POSSIBLE_ANSWERS: dict[str, dict[str, tuple[str, ...]]] = {
    task: {QUESTIONS[kind][language]: _ANSWERS[kind][language] for kind in kinds for language in ("en", "zh")}
    for task, kinds in {"vqa": ("color", "shape", "place"), "ocr_vqa": ("digit",)}.items()
}
"""All answers to every question, by task: `ocr_vqa` asks about what is written in the image."""


def answer(kind: str, scene: Scene, language: str) -> str:
    """Answer a question of `QUESTIONS` about an image with one shape."""
    (figure,) = scene.figures
    zh = language == "zh"
    answers = {
        "color": _COLORS[figure.color] if zh else figure.color,
        "shape": _SHAPES[figure.shape] if zh else figure.shape,
        "place": (_QUARTERS if zh else QUARTERS)[figure.quarter],
        "digit": scene.digit,
    }
    return answers[kind]


def describe_figure(figure: Figure, language: str) -> str:
    """Name colour and shape: `red star`, `红星`."""
    if language == "zh":
        return _COLORS[figure.color] + _SHAPES[figure.shape]
    return f"{figure.color} {figure.shape}"


def caption(rng: Random) -> Drawn:
    """Draw a caption with shape, place and digit of an image."""
    scene, language = shape_scene(rng), _language(rng)
    (figure,) = scene.figures
    if language == "zh":
        text = f"{_QUARTERS[figure.quarter]}{describe_figure(figure, language)}，数字{scene.digit}"
    else:
        text = f"a {describe_figure(figure, language)} at the {QUARTERS[figure.quarter]} and a {scene.digit}"
    return {"task": "caption", "language": language, "caption": text}, (scene,)


def vqa(rng: Random) -> Drawn:
    """Draw a question about the shape, or one about the drawn digit (`ocr_vqa`)."""
    scene, language = shape_scene(rng), _language(rng)
    kind = rng.choice(list(QUESTIONS))
    record = {
        "task": "ocr_vqa" if kind == "digit" else "vqa",
        "question": QUESTIONS[kind][language],
        "answer": answer(kind, scene, language),
    }
    return record, (scene,)


def grounded_caption(rng: Random) -> Drawn:
    """Draw a caption of one or two shapes with their boxes."""
    scene, language = _crowded(rng), _language(rng)
    parts: list[str | SampleRecord] = []
    for figure in scene.figures:
        parts += ["，" if language == "zh" else " and "] if parts else []
        parts.append({"ref": describe_figure(figure, language), "boxes": [figure.box]})
    return {"task": "grounded_caption", "language": language, "caption": parts}, (scene,)


def referring(rng: Random) -> Drawn:
    """Draw a phrase that names one of one or two shapes, and its box."""
    scene, language = _crowded(rng), _language(rng)
    figure = rng.choice(scene.figures)
    return {"task": "referring", "phrase": describe_figure(figure, language), "boxes": [figure.box]}, (scene,)


def region_caption(rng: Random) -> Drawn:
    """Draw the caption of a box around one of one or two shapes."""
    scene, language = _crowded(rng), _language(rng)
    figure = rng.choice(scene.figures)
    return {"task": "region_caption", "box": figure.box, "caption": describe_figure(figure, language)}, (
        scene,
    )


def ocr(rng: Random) -> Drawn:
    """Draw two numbers with their corners."""
    scene = text_scene(rng)
    return {"task": "ocr", "lines": [{"text": text.text, "quad": text.quad} for text in scene.texts]}, (
        scene,
    )


def text(rng: Random) -> Drawn:
    """Draw a sentence without an image."""
    color, shape = rng.choice(list(_COLORS)), rng.choice(list(_SHAPES))
    a, b = rng.randint(0, 4), rng.randint(0, 5)
    sentences = (
        f"{color} is a color, a {shape} is a shape.",
        f"{_COLORS[color]}是颜色，{_SHAPES[shape]}是形状。",
        f"{a} and {b} make {a + b}.",
        f"{a}加{b}是{a + b}。",
    )
    return {"task": "text", "text": rng.choice(sentences)}, ()


def chat(rng: Random) -> Drawn:
    """Draw a dialogue: mostly several questions about one image, sometimes two images, or none."""
    make = rng.choices((_image_dialogue, _two_image_dialogue, _text_dialogue), weights=(16, 1, 1))[0]
    turns, scenes = make(rng, _language(rng))
    speakers = ("user", "assistant")
    conversations = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(turns)]
    return {"task": "chat", "conversations": conversations}, scenes


def dialogue_question(question: str) -> str:
    """Write a question about the only image `png` as the first turn of a dialogue."""
    return f"Picture 1: <img>png</img>\n{question}"


def _image_dialogue(rng: Random, language: str) -> tuple[list[str], tuple[Scene, ...]]:
    scene = shape_scene(rng)
    turns: list[str] = []
    for kind in rng.sample(list(QUESTIONS), rng.randint(2, 4)):
        turns += [QUESTIONS[kind][language], answer(kind, scene, language)]
    turns[0] = dialogue_question(turns[0])
    return turns, (scene,)


def _two_image_dialogue(rng: Random, language: str) -> tuple[list[str], tuple[Scene, ...]]:
    """Draw a dialogue whose second image comes with the second question."""
    turns: list[str] = []
    scenes = (shape_scene(rng), shape_scene(rng))
    for i, scene in enumerate(scenes):
        kind = rng.choice(list(QUESTIONS))
        turns += [
            f"Picture {i + 1}: <img>{i}.png</img>\n{QUESTIONS[kind][language]}",
            answer(kind, scene, language),
        ]
    return turns, scenes


def _text_dialogue(rng: Random, language: str) -> tuple[list[str], tuple[Scene, ...]]:
    a, b = rng.randint(0, 4), rng.randint(0, 5)
    return [f"{a}加{b}？" if language == "zh" else f"{a} and {b}?", str(a + b)], ()


def _crowded(rng: Random) -> Scene:
    return shape_scene(rng, figures=rng.randint(1, 2))


def _language(rng: Random) -> str:
    return "zh" if rng.random() < CHINESE_SHARE else "en"


TASK_MAKERS: dict[str, Callable[[Random], Drawn]] = {
    maker.__name__: maker
    for maker in (caption, vqa, grounded_caption, referring, region_caption, ocr, text, chat)
}
