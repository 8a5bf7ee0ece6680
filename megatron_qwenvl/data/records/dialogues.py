"""Dialogues: which ones are accepted, and how they are read.

The published fine-tuning code takes a list of turns of `user` and `assistant` in any order. The rules here, each with
its reason in `docs/samples.md`:

    leading turn of the assistant       left out of the text, as published
    last turn the user's                kept as context, as published
    names `human`; `gpt`, `chatgpt`, `bot`    the user; the assistant
    leading turn of the `system`        replaces the default system text
    other speakers (tools, observations), the system elsewhere, two turns of one speaker in a row, empty turns,
    no turn of the user, and in training no answer
                                        the sample is left out

Images: see `find_image`. Whatever builds dialogues from raw data goes through these rules too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_qwenvl.data.errors import SampleError

from .fields import AnyText, Record, VerbatimText, excerpt, visible

DEFAULT_SYSTEM = "You are a helpful assistant."
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}

Speaker = Annotated[
    Literal["user", "assistant", "system"],
    BeforeValidator(lambda name: _SPEAKERS.get(name, name) if isinstance(name, str) else name),
]


class Turn(Record):
    """One turn of a dialogue."""

    speaker: Speaker = Field(alias="from")
    value: VerbatimText


class Chat(Record):
    """A dialogue as its record has it; `turns` and `system_text` as it is read."""

    task: Literal["chat"] = "chat"
    system: AnyText | None = None
    conversations: Annotated[tuple[Turn, ...], Field(min_length=1)]

    @property
    def system_text(self) -> str:
        """Text of the system turn."""
        first = self.conversations[0]
        if first.speaker == "system":
            return first.value
        return DEFAULT_SYSTEM if self.system is None else self.system

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Turns of user and assistant in alternation, the user's first."""
        return self.conversations[self._leading :]

    @property
    def _leading(self) -> int:
        """Number of turns before the user's first: the system's, then one of the assistant."""
        system = self.conversations[0].speaker == "system"
        rest = self.conversations[system:]
        return system + bool(rest and rest[0].speaker == "assistant")

    @model_validator(mode="after")
    def _check(self) -> Chat:
        if self.system is not None and self.conversations[0].speaker == "system":
            raise ValueError("two system texts: a system turn and 'system'")
        for number, turn in enumerate(self.turns):
            expected = ("user", "assistant")[number % 2]
            if turn.speaker != expected:
                at = self._leading + number + 1
                raise ValueError(f"turn {at} must be the {expected}'s, found the {turn.speaker}'s")
        if not self.turns:
            raise ValueError("no turn of the user")
        return self


def find_image(name: str, number: int | None, names: Sequence[str], shown: Sequence[int]) -> int:
    """Find the image that `Picture NUMBER: <img>NAME</img>` shows.

    An image is named by its member's suffix, perhaps with blanks around it, and shown once; numbers, where there are
    any, count over the whole dialogue. The published code shows an image that is named twice twice and does not look
    at numbers; here either is taken for a mistake in the dialogue, as the answers rely on the right
    numbers.

    Args:
        name: the name.
        number: the number, if there is one.
        names: the sample's images.
        shown: indices of those that the text has shown so far.

    Returns:
        Its index in `names`.

    Raises:
        SampleError: no such image, shown already, or wrongly numbered.
    """
    found, name = excerpt(name), visible(name).strip()
    if name not in names:
        raise SampleError(f"the text shows an image '{found}', the sample has {', '.join(names) or 'none'}")
    count = len(shown) + 1
    if number is not None and number != count:
        raise SampleError(f"Picture {number} is number {count} of the dialogue")
    if names.index(name) in shown:
        raise SampleError(f"the text shows the image '{name}' twice")
    return names.index(name)
