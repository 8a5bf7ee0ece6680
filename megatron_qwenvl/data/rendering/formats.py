"""Records to token ids and loss masks: the seven task formats (Appendix B of the paper); dialogues in `chatml.py`.

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
images stand before the prompt one after the other. Blanks between the texts and phrases of a grounded caption are
those of the record; `RenderOptions.ref_blank` moves the one before a phrase into `<ref>`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_qwenvl.data.errors import SampleError
from megatron_qwenvl.data.records.dialogues import Chat
from megatron_qwenvl.data.records.tasks import (
    OCR,
    VQA,
    Caption,
    GroundedCaption,
    Phrase,
    PureText,
    Referring,
    RegionCaption,
    Sample,
)

from . import chatml
from .token_builder import DEFAULT_OPTIONS, ImageInfo, RenderOptions, TokenBuilder, TokenizedSample
from .tokenizer import Tokenizer

RENDERING_VERSION = 6
"""Raised whenever a record may render to other tokens, or is accepted or refused where it was not before: an index
made by another version is refused, as its lengths would be wrong. `tests/unit/data/test_rendering_version.py` watches.
"""

LANGUAGES = {"en": "English", "zh": "Chinese"}

_T = TypeVar("_T")


def render_prompt(
    sample: Sample,
    images: Sequence[ImageInfo],
    tokenizer: Tokenizer,
    image_tokens: int,
    language: str = "en",
    options: RenderOptions = DEFAULT_OPTIONS,
) -> TokenizedSample:
    """Everything before `=>`; of pure text the text itself.

    Of a dialogue everything up to `<|im_start|>assistant\\n` of its last answer, or of the answer to come
    when it ends with the user.

    Args:
        sample: the record; its answer is not used and may be missing.
        images: the sample's images, in the order of the sample's image members.
        tokenizer: the vocabulary.
        image_tokens: slots of one image.
        language: language of the caption prompt of a record that does not say its own.
        options: how the record is rendered where there is a choice.

    Raises:
        SampleError: the images do not match the record, a box is not one, or markup does not parse.
    """
    writer = _writer(sample, images, tokenizer, image_tokens, language, options)
    if isinstance(sample, Chat):
        chatml.write_prompt(writer, sample)
    else:
        _FORMATS[type(sample)].prompt(writer, sample)
    return writer.out


def render_sample(
    sample: Sample,
    images: Sequence[ImageInfo],
    tokenizer: Tokenizer,
    image_tokens: int,
    language: str = "en",
    options: RenderOptions = DEFAULT_OPTIONS,
) -> TokenizedSample:
    """The whole sample for training; arguments and errors as `render_prompt`.

    Raises:
        SampleError: also when the record has no answer.
    """
    writer = _writer(sample, images, tokenizer, image_tokens, language, options)
    if isinstance(sample, Chat):
        chatml.write_dialogue(writer, sample)
        if len(writer.out.image_order) != len(images):
            raise SampleError(f"the text shows {len(writer.out.image_order)} of {len(images)} images")
        return writer.out
    form = _FORMATS[type(sample)]
    form.prompt(writer, sample)
    writer.supervised = True
    form.answer(writer, sample)
    writer.ids([tokenizer.eos])
    return writer.out


def _writer(
    sample: Sample,
    images: Sequence[ImageInfo],
    tokenizer: Tokenizer,
    image_tokens: int,
    language: str,
    options: RenderOptions,
) -> TokenBuilder:
    """Start writing after a check of the number of images; those of a dialogue stand in its text."""
    writer = TokenBuilder(tokenizer, images, image_tokens, language, options)
    if not isinstance(sample, Chat):
        form = _FORMATS[type(sample)]
        if not form.min_images <= len(images) <= form.max_images:
            expected = f"{form.min_images} or more" if form.max_images > form.min_images else form.min_images
            raise SampleError(f"{sample.task}: expected {expected} images, found {len(images)}")
        writer.all_images()
    return writer


# ---- the seven formats


def _caption_prompt(writer: TokenBuilder, sample: Caption | GroundedCaption) -> None:
    language = LANGUAGES[sample.language or writer.language]
    grounding = " with grounding" if isinstance(sample, GroundedCaption) else ""
    writer.text(f"Generate the caption in {language}{grounding}:")


def _caption_answer(writer: TokenBuilder, sample: Caption) -> None:
    writer.text(f" {_given(sample.caption, 'caption')}")


def _vqa_prompt(writer: TokenBuilder, sample: VQA) -> None:
    writer.text(f"{sample.question} Answer:")


def _vqa_answer(writer: TokenBuilder, sample: VQA) -> None:
    writer.text(f" {_given(sample.answer, 'answer')}")


def _grounded_answer(writer: TokenBuilder, sample: GroundedCaption) -> None:
    phrases, rest = _text_before_phrases(_given(sample.caption, "caption"))
    for text, phrase in phrases:
        blank = " " if writer.options.ref_blank == "inside" and text.endswith(" ") else ""
        writer.text(text.removesuffix(blank))
        writer.ref(blank + phrase.ref.strip())
        writer.boxes(phrase.boxes)
    writer.text(rest)


def _text_before_phrases(caption: Sequence[str | Phrase]) -> tuple[list[tuple[str, Phrase]], str]:
    """Each phrase with the text before it, and the rest: one blank, then the caption without its outer blanks.

    The outer blanks of a phrase belong to the text around it.
    """
    phrases: list[tuple[str, Phrase]] = []
    text = ""
    for part in caption:
        if isinstance(part, str):
            text += part
        else:
            ref = part.ref
            phrases.append((text + ref[: len(ref) - len(ref.lstrip())], part))
            text = ref[len(ref.rstrip()) :]
    if not phrases:
        return [], f" {text.strip()}"
    phrases[0] = (f" {phrases[0][0].lstrip()}", phrases[0][1])
    return phrases, text.rstrip()


def _referring_prompt(writer: TokenBuilder, sample: Referring) -> None:
    writer.ref(sample.phrase)


def _referring_answer(writer: TokenBuilder, sample: Referring) -> None:
    writer.boxes(_given(sample.boxes, "boxes"))


def _region_prompt(writer: TokenBuilder, sample: RegionCaption) -> None:
    writer.ref("This")
    writer.boxes([sample.box])
    writer.text(" is")


def _region_answer(writer: TokenBuilder, sample: RegionCaption) -> None:
    writer.text(f" {_given(sample.caption, 'caption')}")


def _ocr_prompt(writer: TokenBuilder, sample: OCR) -> None:
    writer.text("OCR with grounding:")


def _ocr_answer(writer: TokenBuilder, sample: OCR) -> None:
    writer.text(" ")
    for line in _given(sample.lines, "lines"):
        writer.ref(line.text)
        writer.text(" ")
        writer.quad(line.quad)


def _text_prompt(writer: TokenBuilder, sample: PureText) -> None:
    writer.supervised = True
    writer.text(sample.text)


def _nothing(writer: TokenBuilder, sample: Sample) -> None:
    pass


def _given(value: _T | None, key: str) -> _T:
    """The part of a record that only training needs."""
    if value is None:
        raise SampleError(f"the record has no {key!r}")
    return value


@dataclass(frozen=True)
class _Format:
    """How a record becomes text, and how many images it has."""

    prompt: Callable[[TokenBuilder, Any], None]
    answer: Callable[[TokenBuilder, Any], None]
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
}
