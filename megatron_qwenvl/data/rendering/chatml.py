"""Dialogues to ChatML, with the loss of the published fine-tuning code.

Learned are the answers, and `<|im_start|>`, `<|im_end|>` and the newline after it of every turn; never learned are
images, the speakers' names, and what system and user say.
"""

from __future__ import annotations

from megatron_qwenvl.data.errors import SampleError
from megatron_qwenvl.data.records.dialogues import Chat, Turn, find_image
from megatron_qwenvl.data.records.markup import Piece, parse_markup

from .token_builder import TokenBuilder


def write_dialogue(writer: TokenBuilder, sample: Chat) -> None:
    """Write all turns.

    Raises:
        SampleError: no turn is an answer; markup or images do not fit.
    """
    if len(sample.turns) < 2:
        raise SampleError("the dialogue has no answer")
    _write_turns(writer, sample, sample.turns)


def write_prompt(writer: TokenBuilder, sample: Chat) -> None:
    """Write everything up to `<|im_start|>assistant\\n` of the last answer, or of the one to come.

    Raises:
        SampleError: markup or images do not fit.
    """
    turns = sample.turns
    _write_turns(writer, sample, turns[:-1] if turns[-1].speaker == "assistant" else turns)
    _open_turn(writer, "assistant")


def _write_turns(writer: TokenBuilder, sample: Chat, turns: tuple[Turn, ...]) -> None:
    _open_turn(writer, "system")
    writer.text(sample.system_text)
    _close_turn(writer)
    for turn in turns:
        _open_turn(writer, turn.speaker)
        writer.supervised = turn.speaker == "assistant"
        for piece in parse_markup(turn.value, keep=writer.options.unparsed_markup == "keep"):
            _write_piece(writer, piece)
        _close_turn(writer)


def _open_turn(writer: TokenBuilder, speaker: str) -> None:
    """The published fine-tuning masks the speaker's name and the newline after it in every turn."""
    writer.supervised = False
    writer.ids([writer.tokenizer.im_start], supervised=True)
    writer.text(speaker)
    writer.text("\n")


def _close_turn(writer: TokenBuilder) -> None:
    writer.ids([writer.tokenizer.im_end], supervised=True)
    writer.text("\n", supervised=True)


def _write_piece(writer: TokenBuilder, piece: Piece) -> None:
    if piece.kind == "text":
        writer.text(piece.text)
    elif piece.kind != "img":
        writer.enclosed(piece.kind, piece.text)
    elif not writer.images and writer.options.unparsed_markup == "keep":
        writer.text(f"<img>{piece.text}</img>")
    else:
        names = [image.name for image in writer.images]
        writer.image(find_image(piece.text, piece.number, names, writer.out.image_order))
