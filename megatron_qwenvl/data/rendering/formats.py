"""The seven task formats (Appendix B of the paper) as token ids with a loss mask; dialogues are in `chatml.py`.

Each format is a pair of functions: one writes the prompt, the other the answer. Training calls both, generation the
first alone, so the two cannot diverge. `=>` marks where the answer, and with it the loss, begins:

    <img>..</img>Generate the caption in English: => the beautiful flowers for design.<eos>
    <img>..</img>Does the bandage have a different color? Answer: => No, both are white.<eos>
    <img>..</img>Generate the caption in English with grounding: => <ref>Bees</ref><box>..</box> fly<eos>
    <img>..</img><ref>the ear on a giraffe</ref> => <box>(176,106),(232,160)</box><eos>
    <img>..</img><ref>This</ref><box>(360,542),(476,705)</box> is => Yellow gloves<eos>
    <img>..</img>OCR with grounding: => <ref>It is managed</ref> <quad>(568,121),..</quad><ref>..<eos>
    text<eos>                                                                   (supervised throughout)

The blank after `=>` belongs to the answer (` the`, ` No`), as generation starts directly after the colon. Several
images stand before the prompt, one after the other. Blanks between the texts and phrases of a grounded caption are
those of the record; `RenderOptions.ref_blank` moves the blank before a phrase into `<ref>`.

To add a format: its record in `records/tasks.py`, its two functions and its line in `FORMATS` here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_qwenvl.data.errors import SampleError
from megatron_qwenvl.data.records.tasks import (
    OCR,
    VQA,
    Caption,
    GroundedCaption,
    Phrase,
    PureText,
    Referring,
    RegionCaption,
    TaskRecord,
)

from .token_builder import TokenBuilder

LANGUAGES = {"en": "English", "zh": "Chinese"}

_T = TypeVar("_T")


def write_task(builder: TokenBuilder, record: TaskRecord, answer: bool) -> None:
    """Write the images and the prompt of a record, and the answer if it is wanted.

    Raises:
        SampleError: the number of images does not fit the task, a box is invalid, or the answer is missing.
    """
    form = FORMATS[type(record)]
    found = len(builder.images)
    if not form.min_images <= found <= form.max_images:
        expected = f"{form.min_images} or more" if form.max_images > form.min_images else form.min_images
        raise SampleError(f"{record.task}: expected {expected} images, found {found}")
    builder.all_images()
    form.write_prompt(builder, record)
    if answer:
        builder.supervised = True
        form.write_answer(builder, record)
        builder.ids([builder.tokenizer.eos])


def _caption_prompt(builder: TokenBuilder, record: Caption | GroundedCaption) -> None:
    language = LANGUAGES[record.language or builder.language]
    grounding = " with grounding" if isinstance(record, GroundedCaption) else ""
    builder.text(f"Generate the caption in {language}{grounding}:")


def _caption_answer(builder: TokenBuilder, record: Caption) -> None:
    builder.text(f" {_required(record.caption, 'caption')}")


def _vqa_prompt(builder: TokenBuilder, record: VQA) -> None:
    builder.text(f"{record.question} Answer:")


def _vqa_answer(builder: TokenBuilder, record: VQA) -> None:
    builder.text(f" {_required(record.answer, 'answer')}")


def _grounded_answer(builder: TokenBuilder, record: GroundedCaption) -> None:
    phrases, rest = _text_before_phrases(_required(record.caption, "caption"))
    for text, phrase in phrases:
        blank = " " if builder.options.ref_blank == "inside" and text.endswith(" ") else ""
        builder.text(text.removesuffix(blank))
        builder.ref(blank + phrase.ref.strip())
        builder.boxes(phrase.boxes)
    builder.text(rest)


def _text_before_phrases(caption: Sequence[str | Phrase]) -> tuple[list[tuple[str, Phrase]], str]:
    """Return each phrase with the text before it, and the text after the last one.

    The outer blanks of a phrase belong to the text around it. The caption begins with exactly one blank and ends
    without any.
    """
    phrases: list[tuple[str, Phrase]] = []
    text = ""
    for piece in caption:
        if isinstance(piece, str):
            text += piece
        else:
            ref = piece.ref
            phrases.append((text + ref[: len(ref) - len(ref.lstrip())], piece))
            text = ref[len(ref.rstrip()) :]
    if not phrases:
        return [], f" {text.strip()}"
    phrases[0] = (f" {phrases[0][0].lstrip()}", phrases[0][1])
    return phrases, text.rstrip()


def _referring_prompt(builder: TokenBuilder, record: Referring) -> None:
    builder.ref(record.phrase)


def _referring_answer(builder: TokenBuilder, record: Referring) -> None:
    builder.boxes(_required(record.boxes, "boxes"))


def _region_prompt(builder: TokenBuilder, record: RegionCaption) -> None:
    builder.ref("This")
    builder.boxes([record.box])
    builder.text(" is")


def _region_answer(builder: TokenBuilder, record: RegionCaption) -> None:
    builder.text(f" {_required(record.caption, 'caption')}")


def _ocr_prompt(builder: TokenBuilder, record: OCR) -> None:
    builder.text("OCR with grounding:")


def _ocr_answer(builder: TokenBuilder, record: OCR) -> None:
    builder.text(" ")
    for line in _required(record.lines, "lines"):
        builder.ref(line.text)
        builder.text(" ")
        builder.quad(line.quad)


def _text_prompt(builder: TokenBuilder, record: PureText) -> None:
    builder.supervised = True
    builder.text(record.text)


def _no_answer(builder: TokenBuilder, record: PureText) -> None:
    """Write nothing: pure text is its own prompt."""


def _required(value: _T | None, key: str) -> _T:
    """Return a value that a record may lack for generation, but not for training."""
    if value is None:
        raise SampleError(f"the record has no {key!r}")
    return value


@dataclass(frozen=True)
class TaskFormat:
    """Functions that render the records of a task, and the numbers of images that these may have."""

    write_prompt: Callable[[TokenBuilder, Any], None]
    write_answer: Callable[[TokenBuilder, Any], None]
    min_images: int = 1
    max_images: int = 1


_MANY = 1000
FORMATS: dict[type, TaskFormat] = {
    Caption: TaskFormat(_caption_prompt, _caption_answer, max_images=_MANY),
    VQA: TaskFormat(_vqa_prompt, _vqa_answer, max_images=_MANY),
    GroundedCaption: TaskFormat(_caption_prompt, _grounded_answer),
    Referring: TaskFormat(_referring_prompt, _referring_answer),
    RegionCaption: TaskFormat(_region_prompt, _region_answer),
    OCR: TaskFormat(_ocr_prompt, _ocr_answer),
    PureText: TaskFormat(_text_prompt, _no_answer, min_images=0, max_images=0),
}
