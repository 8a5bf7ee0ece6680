"""The sample record of each task: what the `.json` member of a sample holds.

Every record is a JSON object with a `task`; keys other than those listed are ignored. Pictures are the
sample's image members (`KEY.jpg`, `KEY.0.jpg`, `KEY.1.png`, ...) in the order of their names, shorter names
first. Coordinates are pixels of the stored picture, x to the right, y down, from the top-left corner.

    caption           caption; language: "en" or "zh" (left out: the source's)            1 picture or more
    vqa, ocr_vqa      question, answer                                                    1 picture or more
    grounded_caption  caption: list of texts and {"ref": text, "boxes": [[x1, y1, x2, y2], ...]};
                      language                                                            1 picture
    referring         phrase, boxes: [[x1, y1, x2, y2], ...]                              1 picture
    region_caption    box: [x1, y1, x2, y2], caption                                      1 picture
    ocr               lines: [{"text": .., "quad": [[x, y], [x, y], [x, y], [x, y]]}, ...],
                      corners clockwise from the top-left                                 1 picture
    text              text                                                                no picture
    chat              conversations: [{"from": "user" or "assistant", "value": text}, ...], the user first,
                      in turns; system: replaces the default system text                  those in the text

In a chat value `<img>NAME</img>` stands for the image member NAME (`<img>0.jpg</img>` for `KEY.0.jpg`); each
picture is named once. A number before it (`Picture 2: <img>..</img>`) counts over the whole dialogue.
`<ref>text</ref>`, `<box>(x1,y1),(x2,y2)</box>` and `<quad>(x,y),(x,y),(x,y),(x,y)</quad>` are grounding
markup there, with coordinates that are already integers in [0, 1000); anything else is ordinary text.

Answers (`answer`, `caption`, the `boxes` of `referring`, `lines`, a last assistant turn) may be left out of a
record that is only asked about; training needs them.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from .errors import SampleError

TASKS = (
    "caption", "vqa", "ocr_vqa", "grounded_caption", "referring", "region_caption", "ocr", "text", "chat",
)  # fmt: skip

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Language = Literal["en", "zh"]
Box = tuple[float, float, float, float]
Point = tuple[float, float]
Quad = tuple[Point, Point, Point, Point]


class Record(BaseModel):
    """Base of every record."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, populate_by_name=True)


class Caption(Record):
    """A picture and its caption."""

    task: Literal["caption"] = "caption"
    caption: Text | None = None
    language: Language | None = None


class VQA(Record):
    """A question about a picture (`ocr_vqa`: about the text in it)."""

    task: Literal["vqa", "ocr_vqa"] = "vqa"
    question: Text
    answer: Text | None = None


class Phrase(Record):
    """A noun phrase of a caption with the boxes of what it names."""

    ref: Text
    boxes: Annotated[tuple[Box, ...], Field(min_length=1)]


class GroundedCaption(Record):
    """A caption whose phrases are located."""

    task: Literal["grounded_caption"] = "grounded_caption"
    caption: Annotated[tuple[str | Phrase, ...], Field(min_length=1)] | None = None
    language: Language | None = None


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


class Line(Record):
    """A piece of text in a picture with its corners."""

    text: Text
    quad: Quad


class OCR(Record):
    """All text of a picture."""

    task: Literal["ocr"] = "ocr"
    lines: Annotated[tuple[Line, ...], Field(min_length=1)] | None = None


class PureText(Record):
    """Text without a picture."""

    task: Literal["text"] = "text"
    text: Annotated[str, Field(min_length=1)]


class Turn(Record):
    """One turn of a dialogue."""

    speaker: Literal["user", "assistant"] = Field(alias="from")
    value: Annotated[str, Field(min_length=1)]


class Chat(Record):
    """A dialogue."""

    task: Literal["chat"] = "chat"
    system: str = "You are a helpful assistant."
    conversations: Annotated[tuple[Turn, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _speakers_alternate(self) -> Chat:
        for number, turn in enumerate(self.conversations):
            expected = ("user", "assistant")[number % 2]
            if turn.speaker != expected:
                raise ValueError(f"turn {number + 1} must be the {expected}'s, found the {turn.speaker}'s")
        return self


Sample = Caption | VQA | GroundedCaption | Referring | RegionCaption | OCR | PureText | Chat
_SAMPLE: TypeAdapter[Sample] = TypeAdapter(Annotated[Sample, Field(discriminator="task")])


def parse_sample(record: Any) -> Sample:
    """Check a decoded JSON value against the schema of its task.

    Raises:
        SampleError: not a record of one of the tasks; the message names the first offending key.
    """
    try:
        return _SAMPLE.validate_python(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SampleError(f"malformed record: {where + ': ' if where else ''}{first['msg']}") from error


def decode_record(suffix: str, data: bytes) -> Sample:
    """The record of a `json` member, or the plain caption of a `txt` member.

    Raises:
        SampleError: malformed.
    """
    try:
        if suffix == "txt":
            return parse_sample({"task": "caption", "caption": data.decode("utf-8")})
        return parse_sample(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise SampleError(f"malformed {suffix}: {error}") from error
