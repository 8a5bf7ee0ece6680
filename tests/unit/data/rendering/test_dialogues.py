"""Dialogues: ids and masks of ChatML, and a rule for each form that dialogues come in."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_qwenvl.data.errors import SampleError
from megatron_qwenvl.data.records.tasks import parse_record
from megatron_qwenvl.data.rendering.renderer import Renderer
from megatron_qwenvl.data.rendering.token_builder import ImageInfo, RenderOptions, TokenizedSample
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer

from .test_formats import BOX, BOX_, END, IMAGE, IMAGE_IDS, QWEN_IMAGE_IDS, REF, REF_, START, render

Turns = list[tuple[str, str]]
SYSTEM = "You are a helpful assistant."


def chat(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    conversations = [{"from": speaker, "value": value} for speaker, value in turns]
    return {"task": "chat", "conversations": conversations, **more}


def spoken(rendered: TokenizedSample, tokenizer: Tokenizer) -> list[str]:
    """The turns of a rendered dialogue, speaker and text."""
    return tokenizer.decode(rendered.tokens).split("<|im_start|>")[1:]


def supervised(rendered: TokenizedSample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([i for i, on in zip(rendered.tokens, rendered.loss_mask, strict=True) if on])


DIALOGUE = {
    "task": "chat",
    "conversations": [
        {"from": "user", "value": "Picture 1: <img>jpg</img>\nWhat is it?"},
        {"from": "assistant", "value": "A cat."},
        {"from": "user", "value": "Where?"},
        {"from": "assistant", "value": "<ref>A cat</ref><box>(1,2),(30,40)</box>"},
    ],
}


def test_chatml_byte_level(byte_level: Tokenizer) -> None:
    parts = [  # (ids, supervised)
        ([START], True), (b"system\nYou are a helpful assistant.", False), ([END, 10], True),
        ([START], True), ([*b"user\nPicture 1: ", *IMAGE_IDS, *b"\nWhat is it?"], False), ([END, 10], True),
        ([START], True), (b"assistant\n", False), (b"A cat.", True), ([END, 10], True),
        ([START], True), (b"user\nWhere?", False), ([END, 10], True),
        ([START], True), (b"assistant\n", False),
        ([REF, *b"A cat", REF_, BOX, *b"(1,2),(30,40)", BOX_, END, 10], True),
    ]  # fmt: skip
    rendered = render(DIALOGUE, byte_level)
    assert rendered.tokens == [token for ids, _ in parts for token in ids]
    assert rendered.loss_mask == [supervised for ids, supervised in parts for _ in ids]
    prompt = Renderer(byte_level, 2).render(parse_record(DIALOGUE), IMAGE, answer=False)
    assert prompt.tokens == [token for ids, _ in parts[:-1] for token in ids]
    open_ended = {**DIALOGUE, "conversations": DIALOGUE["conversations"][:3]}
    assert (
        Renderer(byte_level, 2).render(parse_record(open_ended), IMAGE, answer=False).tokens == prompt.tokens
    )


def test_chatml_qwen(qwen: Tokenizer) -> None:
    rendered = render(DIALOGUE, qwen)
    assert rendered.tokens == [
        151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198,
        151644, 872, 198, 24669, 220, 16, 25, 220, *QWEN_IMAGE_IDS, 198, 3838, 374, 432, 30, 151645, 198,
        151644, 77091, 198, 32, 8251, 13, 151645, 198,
        151644, 872, 198, 9064, 30, 151645, 198,
        151644, 77091, 198, 151851, 32, 8251, 151852,
        151853, 7, 16, 11, 17, 23547, 18, 15, 11, 19, 15, 8, 151854, 151645, 198,
    ]  # fmt: skip
    assert "".join(str(int(supervised)) for supervised in rendered.loss_mask) == (
        "10000000011" "1000000000000000011" "10011111" "1000011" "1001111111111111111111"
    )  # fmt: skip


def test_chat_takes_images_in_the_order_of_the_text(byte_level: Tokenizer) -> None:
    images = [ImageInfo("0.jpg", 4, 4), ImageInfo("1.jpg", 4, 4), ImageInfo("2.jpg", 4, 4)]
    turns = [
        {"from": "user", "value": "Picture 1: <img>2.jpg</img>\nPicture 2: <img>0.jpg</img>\nSame?"},
        {"from": "assistant", "value": "No."},
        {"from": "user", "value": "Picture 3: <img>1.jpg</img>\nAnd now?"},
        {"from": "assistant", "value": "Yes."},
    ]
    rendered = render({"task": "chat", "conversations": turns}, byte_level, images)
    assert rendered.image_order == [2, 0, 1]
    assert [rendered.tokens[at - 1 : at + 3] for at in rendered.image_starts] == [IMAGE_IDS] * 3


def test_an_image_in_an_answer_is_not_supervised(byte_level: Tokenizer) -> None:
    turns = [{"from": "user", "value": "Show."}, {"from": "assistant", "value": "Here: <img>jpg</img>!"}]
    rendered = render({"task": "chat", "conversations": turns}, byte_level)
    (start,) = rendered.image_starts
    assert rendered.loss_mask[start - 2 : start + 4] == [True, False, False, False, False, True]


Q, A = ("user", "q"), ("assistant", "a")
TURN = "<|im_start|><|im_end|>\n"  # supervised of a turn that is no answer


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        (chat(Q, A), [f"system\n{SYSTEM}", "user\nq", "assistant\na"]),
        (chat(A, Q, A), [f"system\n{SYSTEM}", "user\nq", "assistant\na"]),
        (chat(Q, A, ("user", "more")), [f"system\n{SYSTEM}", "user\nq", "assistant\na", "user\nmore"]),
        (chat(("human", "q"), ("gpt", "a")), [f"system\n{SYSTEM}", "user\nq", "assistant\na"]),
        (chat(("human", "q"), ("chatgpt", "a"), Q, ("bot", "b")),
         [f"system\n{SYSTEM}", "user\nq", "assistant\na", "user\nq", "assistant\nb"]),
        (chat(("system", "Be brief."), Q, A), ["system\nBe brief.", "user\nq", "assistant\na"]),
        (chat(("system", "Be brief."), A, Q, A), ["system\nBe brief.", "user\nq", "assistant\na"]),
        (chat(Q, A, system=""), ["system\n", "user\nq", "assistant\na"]),
        (chat(Q, A, system=None), [f"system\n{SYSTEM}", "user\nq", "assistant\na"]),
        (chat(("user", " q\n"), A), [f"system\n{SYSTEM}", "user\n q\n", "assistant\na"]),
    ],
)  # fmt: skip
def test_dialogues_that_are_accepted(byte_level: Tokenizer, record: dict[str, Any], turns: list[str]) -> None:
    rendered = render(record, byte_level, [])
    assert spoken(rendered, byte_level) == [f"{turn}<|im_end|>\n" for turn in turns]
    answers = [turn.removeprefix("assistant\n") if turn.startswith("assistant") else "" for turn in turns]
    assert supervised(rendered, byte_level) == "".join(
        f"<|im_start|>{answer}<|im_end|>\n" for answer in answers
    )


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (chat(Q, Q, A), "turn 2 must be the assistant's, found the user's"),
        (chat(Q, A, A), "turn 3 must be the user's, found the assistant's"),
        (chat(A, A, Q), "turn 2 must be the user's, found the assistant's"),
        (chat(("system", "s"), A, A, Q), "turn 3 must be the user's, found the assistant's"),
        (chat(Q, ("system", "s"), A), "turn 2 must be the assistant's, found the system's"),
        (chat(("system", "s"), ("system", "s"), Q, A), "turn 2 must be the user's, found the system's"),
        (chat(("system", "s"), Q, A, system="t"), "two system texts"),
        (chat(("system", "s")), "no turn of the user"),
        (chat(A), "no turn of the user"),
        (
            chat(("observation", "o"), A),
            "conversations.0.from: Input should be 'user', 'assistant' or 'system'",
        ),
        (chat(Q, ("tool", "t"), A), "conversations.1.from: "),
        (chat(Q, ("bing", "a")), "conversations.1.from: "),
        (chat(Q, ("assistant", "")), "conversations.1.value: empty or blank text"),
        (chat(("user", " \n\u200b"), A), "conversations.0.value: empty or blank text"),
        (chat(Q, ("assistant", None)), "conversations.1.value: Input should be a valid string"),
        (chat(Q, ("assistant", 3)), "conversations.1.value: Input should be a valid string"),
        (chat(), "at least 1"),
        (chat(Q), "the dialogue has no answer"),
        (chat(A, Q), "the dialogue has no answer"),
        (
            {"task": "chat", "conversations": [{"role": "user", "content": "q"}]},
            "conversations.0.from: Field required",
        ),
        (
            {"task": "chat", "conversations": [{"speaker": "user", "value": "q"}]},
            "conversations.0.from: Field required",
        ),
    ],
)
def test_dialogues_that_are_left_out(byte_level: Tokenizer, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        render(record, byte_level, [])


def test_a_dialogue_without_an_answer_can_be_asked(byte_level: Tokenizer) -> None:
    for record in (chat(Q), chat(Q, A), chat(A, Q)):
        prompt = Renderer(byte_level, 2).render(parse_record(record), [], answer=False)
        assert spoken(prompt, byte_level)[1:] == ["user\nq<|im_end|>\n", "assistant\n"]


TWO = [ImageInfo("0.jpg", 4, 4), ImageInfo("1.jpg", 4, 4)]


@pytest.mark.parametrize(
    ("turns", "order"),
    [
        ([("user", "<img>0.jpg</img><img>1.jpg</img>q"), A], [0, 1]),
        ([("user", "<img>1.jpg</img><img>0.jpg</img>q"), A], [1, 0]),
        ([("user", "Picture 1:<img>1.jpg</img>q"), A, ("user", "Picture 2: <img>0.jpg</img>q"), A], [1, 0]),
        ([("user", "<img>0.jpg</img>q"), ("assistant", "here <img>1.jpg</img>")], [0, 1]),
        ([("user", "Picture 1:\n<img> 1.jpg\n</img>图2\uff1a<img>\ufeff0.jpg</img>q"), A], [1, 0]),
        ([Q, A, ("user", "Picture 1: <img>0.jpg</img>\nPicture 2: <img>1.jpg</img>")], [0, 1]),
    ],
)
def test_images_that_are_accepted(byte_level: Tokenizer, turns: Turns, order: list[int]) -> None:
    rendered = render(chat(*turns), byte_level, TWO)
    assert rendered.image_order == order
    slots = {byte_level.img_start, byte_level.img_pad, byte_level.img_end}
    assert not any(on for i, on in zip(rendered.tokens, rendered.loss_mask, strict=True) if i in slots)


@pytest.mark.parametrize(
    ("turns", "names", "reason"),
    [
        ([("user", "Picture 1: <img>0.jpg</img>q"), A, ("user", "Picture 1: <img>1.jpg</img>q"), A],
         ["0.jpg", "1.jpg"], "Picture 1 is number 2 of the dialogue"),
        ([("user", "Picture 2: <img>0.jpg</img>"), A], ["0.jpg"], "Picture 2 is number 1 of the dialogue"),
        ([("user", "Picture 0: <img>0.jpg</img>"), A], ["0.jpg"], "Picture 0 is number 1"),
        ([("user", "Picture 2:\n<img>0.jpg</img>"), A], ["0.jpg"], "Picture 2 is number 1"),
        ([("user", "Picture  2: <img>0.jpg</img>"), A], ["0.jpg"], "Picture 2 is number 1"),
        ([("user", "see picture 7 : <img>0.jpg</img>"), A], ["0.jpg"], "Picture 7 is number 1"),
        ([("user", "**Picture 2**:  <img>0.jpg</img>"), A], ["0.jpg"], "Picture 2 is number 1"),
        ([("user", "Picture 2\uff1a<img>0.jpg</img>"), A], ["0.jpg"], "Picture 2 is number 1"),
        ([("user", "Picture \uff12: <img>0.jpg</img>"), A], ["0.jpg"], "Picture 2 is number 1"),
        ([("user", "图7: <img>0.jpg</img>"), A], ["0.jpg"], "Picture 7 is number 1"),
        ([("user", "Image 3: <img>0.jpg</img>"), A], ["0.jpg"], "Picture 3 is number 1"),
        ([("user", "Picture 2:\n<img>a.jpg\nWhat is it?"), A], [], "does not parse: 'Picture 2: <img>a"),
        ([("user", f"Picture {'9' * 5000}: <img>0.jpg</img>"), A], ["0.jpg"], "is number 1"),
        ([("user", "<img>0.jpg</img><img>0.jpg</img><img>1.jpg</img>"), A], ["0.jpg", "1.jpg"],
         "shows the image '0.jpg' twice"),
        ([("user", "<img>0.jpg</img>"), A], ["0.jpg", "1.jpg"], "shows 1 of 2 images"),
        ([("user", "no image"), A], ["jpg"], "shows 0 of 1 images"),
        ([("assistant", "<img>jpg</img>"), Q, A], ["jpg"], "shows 0 of 1 images"),
        ([("user", "<img>/data/0.jpg</img>"), A], ["0.jpg"], "shows an image '/data/0.jpg', the sample has 0.jpg"),
        ([("user", "<img>jpg</img>"), A], [], "shows an image 'jpg', the sample has none"),
        ([("user", "Picture 1: <img>a.jpg\nWhat is it?"), A], [], "markup that does not parse: 'Picture 1: <img>a"),
        ([("user", "<img>jpg</img></img>"), A], ["jpg"], "markup that does not parse: '</img>'"),
    ],
)  # fmt: skip
def test_images_that_leave_a_dialogue_out(
    byte_level: Tokenizer, turns: Turns, names: list[str], reason: str
) -> None:
    with pytest.raises(SampleError, match=reason):
        render(chat(*turns), byte_level, [ImageInfo(name, 9, 9) for name in names])


def test_a_dialogue_about_html_can_be_kept(byte_level: Tokenizer) -> None:
    """Without an image it cannot be known whether one is missing; who vouches for the text says so."""
    record = chat(("user", "Close <img>photo.png</img>?"), A)
    renderer = Renderer(byte_level, 2, options=RenderOptions(unparsed_markup="keep"))
    rendered = renderer.render(parse_record(record), [])
    assert spoken(rendered, byte_level)[1] == "user\nClose <img>photo.png</img>?<|im_end|>\n"
    assert byte_level.img_start not in rendered.tokens
    with pytest.raises(SampleError, match="shows an image 'photo.png', the sample has 0.jpg"):
        renderer.render(parse_record(record), TWO[:1])
