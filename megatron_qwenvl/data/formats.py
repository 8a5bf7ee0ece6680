"""Records to token ids and loss masks: the seven task formats (Appendix B of the paper) and ChatML.

Each format is a pair of functions: one writes the prompt, the other what is to be learned. Training calls
both, inference only the first, so the two cannot diverge. `=>` marks where one ends and the other starts:

    <img>..</img>Generate the caption in English: => the beautiful flowers for design.<eos>
    <img>..</img>Does the bandage have a different color? Answer: => No, both are white.<eos>
    <img>..</img>Generate the caption in English with grounding: => <ref>Bees</ref><box>..</box> fly<eos>
    <img>..</img><ref>the ear on a giraffe</ref> => <box>(176,106),(232,160)</box><eos>
    <img>..</img><ref>This</ref><box>(360,542),(476,705)</box> is => Yellow gloves<eos>
    <img>..</img>OCR with grounding: => <ref>It is managed</ref> <quad>(568,121),..</quad><ref>..<eos>
    text<eos>                                                                   (learned throughout)

The blank after `=>` belongs to the answer (` the`, ` No`), as generation starts behind the colon. Several
pictures stand before the prompt one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from .errors import SampleError
from .tasks import OCR, VQA, Caption, Chat, GroundedCaption, PureText, Referring, RegionCaption, Sample
from .tokenizer import Tokenizer
from .writer import ImageInfo, Rendered, Writer

RENDERING_VERSION = 2
"""Raised whenever a record may render to other tokens, or is accepted or refused where it was not before: an index
made by another version is refused, as its lengths would be wrong. `tests/unit/data/test_rendering_version.py` watches.
"""

LANGUAGES = {"en": "English", "zh": "Chinese"}

_T = TypeVar("_T")
_POINT = r"\([0-9]{1,3},[0-9]{1,3}\)"
_MARKUP = re.compile(
    r"(?:Picture (?P<number>[0-9]+): ?)?<img>(?P<img>[^<>]*)</img>"
    r"|<ref>(?P<ref>[^<>]+)</ref>"
    rf"|<box>(?P<box>{_POINT},{_POINT})</box>"
    rf"|<quad>(?P<quad>{_POINT}(?:,{_POINT}){{3}})</quad>"
)


def render_prompt(
    sample: Sample, images: Sequence[ImageInfo], tokenizer: Tokenizer, image_tokens: int, language: str = "en"
) -> Rendered:
    """Everything before `=>`; of pure text the text itself.

    Of a dialogue everything up to `<|im_start|>assistant\\n` of its last answer, or of the answer to come
    when it ends with the user.

    Args:
        sample: the record; its answer is not used and may be missing.
        images: the sample's pictures, in the order of the sample's image members.
        tokenizer: the vocabulary.
        image_tokens: slots of one picture.
        language: language of the caption prompt of a record that does not say its own.

    Raises:
        SampleError: the pictures do not match the record, or a box is not one.
    """
    return _write_prompt(sample, images, tokenizer, image_tokens, language).out


def render_sample(
    sample: Sample, images: Sequence[ImageInfo], tokenizer: Tokenizer, image_tokens: int, language: str = "en"
) -> Rendered:
    """The whole sample for training; arguments and errors as `render_prompt`.

    Raises:
        SampleError: also when the record has no answer.
    """
    writer = _write_prompt(sample, images, tokenizer, image_tokens, language)
    writer.learn = True
    _FORMATS[type(sample)].answer(writer, sample)
    if not isinstance(sample, Chat):
        writer.ids([tokenizer.eos])
    elif sorted(writer.out.image_order) != list(range(len(images))):
        raise SampleError(f"the text shows {len(writer.out.image_order)} of {len(images)} pictures")
    return writer.out


def _write_prompt(
    sample: Sample, images: Sequence[ImageInfo], tokenizer: Tokenizer, image_tokens: int, language: str
) -> Writer:
    """Write the prompt after a check of the number of pictures."""
    form = _FORMATS[type(sample)]
    if not form.min_images <= len(images) <= form.max_images:
        expected = f"{form.min_images} or more" if form.max_images > form.min_images else form.min_images
        raise SampleError(f"{sample.task}: expected {expected} pictures, found {len(images)}")
    writer = Writer(tokenizer, images, image_tokens, language)
    if not isinstance(sample, Chat):
        writer.all_images()
    form.prompt(writer, sample)
    return writer


# ---- the seven formats


def _caption_prompt(writer: Writer, sample: Caption | GroundedCaption) -> None:
    language = LANGUAGES[sample.language or writer.language]
    grounding = " with grounding" if isinstance(sample, GroundedCaption) else ""
    writer.text(f"Generate the caption in {language}{grounding}:")


def _caption_answer(writer: Writer, sample: Caption) -> None:
    writer.text(f" {_given(sample.caption, 'caption')}")


def _vqa_prompt(writer: Writer, sample: VQA) -> None:
    writer.text(f"{sample.question} Answer:")


def _vqa_answer(writer: Writer, sample: VQA) -> None:
    writer.text(f" {_given(sample.answer, 'answer')}")


def _grounded_answer(writer: Writer, sample: GroundedCaption) -> None:
    blank = " "
    for part in _given(sample.caption, "caption"):
        if isinstance(part, str):
            writer.text(blank + part if not part.startswith(" ") else part)
        else:
            writer.text(blank)
            writer.ref(part.ref)
            writer.boxes(part.boxes)
        blank = ""


def _referring_prompt(writer: Writer, sample: Referring) -> None:
    writer.ref(sample.phrase)


def _referring_answer(writer: Writer, sample: Referring) -> None:
    writer.boxes(_given(sample.boxes, "boxes"))


def _region_prompt(writer: Writer, sample: RegionCaption) -> None:
    writer.ref("This")
    writer.boxes([sample.box])
    writer.text(" is")


def _region_answer(writer: Writer, sample: RegionCaption) -> None:
    writer.text(f" {_given(sample.caption, 'caption')}")


def _ocr_prompt(writer: Writer, sample: OCR) -> None:
    writer.text("OCR with grounding:")


def _ocr_answer(writer: Writer, sample: OCR) -> None:
    writer.text(" ")
    for line in _given(sample.lines, "lines"):
        writer.ref(line.text)
        writer.text(" ")
        writer.quad(line.quad)


def _text_prompt(writer: Writer, sample: PureText) -> None:
    writer.learn = True
    writer.text(sample.text)


def _nothing(writer: Writer, sample: Sample) -> None:
    pass


# ---- ChatML


def _chat_prompt(writer: Writer, sample: Chat) -> None:
    turns = sample.conversations
    history = turns[:-1] if turns[-1].speaker == "assistant" else turns
    _open_turn(writer, "system")
    writer.text(sample.system)
    _close_turn(writer)
    for turn in history:
        _open_turn(writer, turn.speaker)
        _value(writer, turn.value, learn=turn.speaker == "assistant")
        _close_turn(writer)
    _open_turn(writer, "assistant")


def _chat_answer(writer: Writer, sample: Chat) -> None:
    last = sample.conversations[-1]
    if last.speaker != "assistant":
        raise SampleError("the dialogue has no last answer")
    _value(writer, last.value, learn=True)
    _close_turn(writer)


def _open_turn(writer: Writer, speaker: str) -> None:
    """The published fine-tuning masks the speaker's name and the newline after it in every turn."""
    writer.learn = False
    writer.ids([writer.tokenizer.im_start], learn=True)
    writer.text(speaker)
    writer.text("\n")


def _close_turn(writer: Writer) -> None:
    writer.ids([writer.tokenizer.im_end], learn=True)
    writer.text("\n", learn=True)


def _value(writer: Writer, value: str, learn: bool) -> None:
    """A turn's text, in which pictures and well-formed grounding markup become special tokens."""
    writer.learn = learn
    end = 0
    for match in _MARKUP.finditer(value):
        kind = cast(Literal["img", "ref", "box", "quad"], match.lastgroup)
        writer.text(value[end : match.start(kind) - len(f"<{kind}>")])
        if kind == "img":
            writer.image(_named_image(writer, match["img"], match["number"]))
        else:
            writer.enclosed(kind, match[kind])
        end = match.end()
    writer.text(value[end:])


def _named_image(writer: Writer, name: str, number: str | None) -> int:
    """Index of the picture that a placeholder names."""
    names = [image.name for image in writer.images]
    if name not in names:
        raise SampleError(f"the text shows a picture {name!r}, the sample has {', '.join(names) or 'none'}")
    count = len(writer.out.image_order) + 1
    if number is not None and int(number) != count:
        raise SampleError(f"Picture {number} is number {count} of the dialogue")
    if names.index(name) in writer.out.image_order:
        raise SampleError(f"the text shows the picture {name!r} twice")
    return names.index(name)


# ---- answers and coordinates


def _given(value: _T | None, key: str) -> _T:
    """The part of a record that only training needs."""
    if value is None:
        raise SampleError(f"the record has no {key!r}")
    return value


@dataclass(frozen=True)
class _Format:
    """How a record becomes text, and how many pictures it has."""

    prompt: Callable[[Writer, Any], None]
    answer: Callable[[Writer, Any], None]
    min_images: int = 1
    max_images: int = 1


_MANY = 1000
_FORMATS: dict[type, _Format] = {
    Caption: _Format(_caption_prompt, _caption_answer, max_images=_MANY),
    VQA: _Format(_vqa_prompt, _vqa_answer, max_images=_MANY),
    GroundedCaption: _Format(_caption_prompt, _grounded_answer),
    Referring: _Format(_referring_prompt, _referring_answer),
    RegionCaption: _Format(_region_prompt, _region_answer),
    OCR: _Format(_ocr_prompt, _ocr_answer),
    PureText: _Format(_text_prompt, _nothing, min_images=0, max_images=0),
    Chat: _Format(_chat_prompt, _chat_answer, min_images=0, max_images=_MANY),
}
