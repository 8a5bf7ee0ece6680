"""The sample record of each task: what the `.json` member of a sample holds.

Every record is a JSON object with a `task`; keys other than those listed are ignored. Images are the
sample's image members (`KEY.jpg`, `KEY.0.jpg`, `KEY.1.png`, ...) in the order of their numbers. Coordinates are
pixels of the stored image (EXIF orientation is not applied), x to the right, y down, from the top-left corner.

    caption           caption; language: "en" or "zh" (left out: the source's)            1 image or more
    vqa, ocr_vqa      question, answer                                                    1 image or more
    grounded_caption  caption: list of texts and {"ref": text, "boxes": [[x1, y1, x2, y2], ...]};
                      blanks between them as given; language                              1 image
    referring         phrase, boxes: [[x1, y1, x2, y2], ...]                              1 image
    region_caption    box: [x1, y1, x2, y2], caption                                      1 image
    ocr               lines: [{"text": .., "quad": [[x, y], [x, y], [x, y], [x, y]]}, ...],
                      corners clockwise from the top-left                                 1 image
    text              text                                                                no image
    chat              conversations: [{"from": "user" or "assistant", "value": text}, ...]; system: replaces the
                      default system text; rules in `dialogues.py`                        those in the text

In a chat value `<img>NAME</img>` stands for the image member NAME (`<img>0.jpg</img>` for `KEY.0.jpg`); each
image is named once. A number before it (`Picture 2: <img>..</img>`) counts over the whole dialogue.
Grounding markup there is described in `markup.py`. In all other fields tags are ordinary text.

Text is UTF-8 and rules for it hold in every field (`fields.py`): a byte-order mark at the start of a member or a field
is dropped; a lone surrogate, a NUL or a text that shows nothing leaves the sample out. Only strings are text: how a
number, a boolean or a list of answers is spelled is for the author of the record.

Answers (`answer`, `caption`, the `boxes` of `referring`, `lines`, a last assistant turn) may be left out of a
record that is only asked about; training needs them.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError, field_validator

from megatron_qwenvl.data.errors import SampleError

from .dialogues import Chat
from .fields import AnyText, Box, Quad, Record, Text, VerbatimText, excerpt, is_blank

TASKS = (
    "caption", "vqa", "ocr_vqa", "grounded_caption", "referring", "region_caption", "ocr", "text", "chat",
)  # fmt: skip

Language = Literal["en", "zh"]


class Caption(Record):
    """An image and its caption."""

    task: Literal["caption"] = "caption"
    caption: Text | None = None
    language: Language | None = None


class VQA(Record):
    """A question about an image (`ocr_vqa`: about the text in it)."""

    task: Literal["vqa", "ocr_vqa"] = "vqa"
    question: Text
    answer: Text | None = None


class Phrase(Record):
    """A noun phrase of a caption with the boxes of what it names."""

    ref: VerbatimText
    boxes: Annotated[tuple[Box, ...], Field(min_length=1)]


_Part = Annotated[
    Annotated[AnyText, Tag("text")] | Annotated[Phrase, Tag("phrase")],
    Discriminator(lambda part: "text" if isinstance(part, str) else "phrase"),  # a plain union explains badly
]


class GroundedCaption(Record):
    """A caption whose phrases are located."""

    task: Literal["grounded_caption"] = "grounded_caption"
    caption: Annotated[tuple[_Part, ...], Field(min_length=1)] | None = None
    language: Language | None = None

    @field_validator("caption")
    @classmethod
    def _not_blank(cls, caption: tuple[str | Phrase, ...] | None) -> tuple[str | Phrase, ...] | None:
        if caption and all(isinstance(part, str) and is_blank(part) for part in caption):
            raise ValueError("empty or blank text")
        return caption


class Referring(Record):
    """A phrase and the boxes of what it names."""

    task: Literal["referring"] = "referring"
    phrase: Text
    boxes: Annotated[tuple[Box, ...], Field(min_length=1)] | None = None


class RegionCaption(Record):
    """A box and what it shows."""

    task: Literal["region_caption"] = "region_caption"
    box: Box
    caption: Text | None = None


class OCRLine(Record):
    """A piece of text in an image with its corners."""

    text: Text
    quad: Quad


class OCR(Record):
    """All text of an image."""

    task: Literal["ocr"] = "ocr"
    lines: Annotated[tuple[OCRLine, ...], Field(min_length=1)] | None = None


class PureText(Record):
    """Text without an image."""

    task: Literal["text"] = "text"
    text: VerbatimText


TaskRecord = Caption | VQA | GroundedCaption | Referring | RegionCaption | OCR | PureText | Chat
_RECORD: TypeAdapter[TaskRecord] = TypeAdapter(Annotated[TaskRecord, Field(discriminator="task")])


def parse_record(record: Any) -> TaskRecord:
    """Check a decoded JSON value against the schema of its task.

    Raises:
        SampleError: not a record of one of the tasks; the message names the first offending key.
    """
    if isinstance(record, dict) and record.get("task") not in TASKS:
        found = "no task" if record.get("task") is None else excerpt(repr(record["task"]))
        raise SampleError(f"malformed record: expected a task of {', '.join(TASKS)}, found {found}")
    try:
        return _RECORD.validate_python(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = excerpt(first["msg"].removeprefix("Value error, "), 200)
        raise SampleError(f"malformed record: {where + ': ' if where else ''}{reason}") from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of a record; of two values for a key Python would silently take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {excerpt(twice)!r} occurs twice")
    return found


def decode_record(suffix: str, data: bytes) -> TaskRecord:
    """Decode the record of a `json` file, or the plain caption of a `txt` file; both UTF-8.

    Raises:
        SampleError: malformed.
    """
    try:
        text = data.decode("utf-8-sig")
        if suffix == "txt":
            return parse_record({"task": "caption", "caption": text})
        return parse_record(json.loads(text, object_pairs_hook=_each_key_once))
    except UnicodeDecodeError as error:
        raise SampleError(f"malformed {suffix}: not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("; use sys.")[0]  # advice for programmers
        raise SampleError(f"malformed {suffix}: {reason}") from error
