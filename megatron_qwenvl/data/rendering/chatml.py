"""Dialogues to ChatML, with the loss mask of the published fine-tuning code.

Supervised are the answers, and of every turn `<|im_start|>`, `<|im_end|>` and the newline after it. Not supervised are
images, the speakers' names, and the text of system and user.
"""

from __future__ import annotations

from megatron_qwenvl.data.errors import SampleError
from megatron_qwenvl.data.records.dialogues import Chat, Turn, find_image
from megatron_qwenvl.data.records.markup import Piece, parse_markup

from .token_builder import TokenBuilder


def write_dialogue(builder: TokenBuilder, chat: Chat, answer: bool) -> None:
    """Write all turns of a dialogue, or its prompt.

    Args:
        builder: receives the tokens.
        chat: the dialogue.
        answer: write all turns. Otherwise stop after `<|im_start|>assistant\\n` of the last answer, or of the answer
            to come where the dialogue ends with the user.

    Raises:
        SampleError: markup or images do not fit; with `answer`, also if no turn is an answer or an image is not shown.
    """
    turns = chat.turns
    if not answer:
        _write_turns(builder, chat, turns[:-1] if turns[-1].speaker == "assistant" else turns)
        _open_turn(builder, "assistant")
        return
    if len(turns) < 2:
        raise SampleError("the dialogue has no answer")
    _write_turns(builder, chat, turns)
    shown, given = len(builder.sample.image_order), len(builder.images)
    if shown != given:
        raise SampleError(f"the text shows {shown} of {given} images")


def _write_turns(builder: TokenBuilder, chat: Chat, turns: tuple[Turn, ...]) -> None:
    _open_turn(builder, "system")
    builder.text(chat.system_text)
    _close_turn(builder)
    for turn in turns:
        _open_turn(builder, turn.speaker)
        builder.supervised = turn.speaker == "assistant"
        for piece in parse_markup(turn.value, keep=builder.options.unparsed_markup == "keep"):
            _write_piece(builder, piece)
        _close_turn(builder)


def _open_turn(builder: TokenBuilder, speaker: str) -> None:
    """Write the start of a turn; the published code masks the speaker's name and the newline after it."""
    builder.supervised = False
    builder.ids([builder.tokenizer.im_start], supervised=True)
    builder.text(speaker)
    builder.text("\n")


def _close_turn(builder: TokenBuilder) -> None:
    builder.ids([builder.tokenizer.im_end], supervised=True)
    builder.text("\n", supervised=True)


def _write_piece(builder: TokenBuilder, piece: Piece) -> None:
    if piece.kind == "text":
        builder.text(piece.text)
    elif piece.kind != "img":
        builder.enclosed(piece.kind, piece.text)
    elif not builder.images and builder.options.unparsed_markup == "keep":
        builder.text(f"<img>{piece.text}</img>")
    else:
        names = [image.name for image in builder.images]
        builder.image(find_image(piece.text, piece.number, names, builder.sample.image_order))
