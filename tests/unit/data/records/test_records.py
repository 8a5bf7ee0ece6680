"""Records: one rule for text and one for coordinates in every field, and reasons that name the key."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from megatron_qwenvl.data.errors import SampleError
from megatron_qwenvl.data.records.coordinates import normalise
from megatron_qwenvl.data.records.markup import parse_markup
from megatron_qwenvl.data.records.tasks import decode_record, parse_record
from megatron_qwenvl.data.rendering.renderer import Renderer
from megatron_qwenvl.data.rendering.token_builder import RenderOptions
from megatron_qwenvl.data.rendering.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.unit.data.rendering.test_formats import IMAGE, render

BOX, QUAD = [0, 0, 9, 9], [[0, 0], [9, 0], [9, 9], [0, 9]]
FIELDS = {
    "caption": lambda text: {"task": "caption", "caption": text},
    "question": lambda text: {"task": "vqa", "question": text, "answer": "a"},
    "answer": lambda text: {"task": "ocr_vqa", "question": "q", "answer": text},
    "part": lambda text: {"task": "grounded_caption", "caption": [text]},
    "ref": lambda text: {"task": "grounded_caption", "caption": [{"ref": text, "boxes": [BOX]}]},
    "phrase": lambda text: {"task": "referring", "phrase": text, "boxes": [BOX]},
    "region": lambda text: {"task": "region_caption", "box": BOX, "caption": text},
    "line": lambda text: {"task": "ocr", "lines": [{"text": text, "quad": QUAD}]},
    "text": lambda text: {"task": "text", "text": text},
    "user": lambda text: _chat(text, "a"),
    "assistant": lambda text: _chat("q", text),
    "system": lambda text: {**_chat("q", "a"), "system": text},
}
MAY_BE_EMPTY = {"system"}


def _chat(user: str, assistant: str) -> dict[str, Any]:
    turns = [{"from": "user", "value": user}, {"from": "assistant", "value": assistant}]
    return {"task": "chat", "conversations": turns}


def tokens(record: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    images = [] if record["task"] in ("text", "chat") else IMAGE
    return Renderer(tokenizer, 2).render(decode_record("json", json.dumps(record).encode()), images).tokens


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a \ud83d b", "a lone surrogate: half of a character"),
        ("\udc00", "a lone surrogate"),
        ("a\0b", "a NUL character"),
        ("", "empty or blank text"),
        (" \n\t", "empty or blank text"),
        ("\ufeff", "empty or blank text"),
        ("\u200b\u00a0\u2028\x07", "empty or blank text"),
    ],
)
def test_text_that_is_none_is_refused_in_every_field(
    byte_level: Tokenizer, field: str, text: str, reason: str
) -> None:
    record = FIELDS[field](text)
    if field in MAY_BE_EMPTY and reason.startswith("empty"):
        tokens(record, byte_level)
        return
    with pytest.raises(SampleError, match=rf"^malformed record: {record['task']}\.[a-z0-9.]+: {reason}"):
        tokens(record, byte_level)


@pytest.mark.parametrize("field", FIELDS)
def test_text_is_treated_equally_in_every_field(byte_level: Tokenizer, field: str) -> None:
    make = FIELDS[field]
    plain = tokens(make("x caf\u00e9"), byte_level)
    for start in ("\ufeff", "\ufeff\ufeff"):  # byte-order marks
        assert tokens(make(f"{start}x caf\u00e9"), byte_level) == plain
    assert tokens(make(" \ufeffx caf\u00e9"), byte_level) == tokens(make(" x caf\u00e9"), byte_level)
    assert tokens(make("x cafe\u0301"), byte_level) == plain  # NFC
    for kept in ("a\r\nb", "a\u200b\u200db", "a\ufeffb", "\U0001f600"):
        assert kept in byte_level.decode(tokens(make(kept), byte_level))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [3, 2.5, True, ["a"], {"a": 1}])
def test_only_strings_are_text(byte_level: Tokenizer, field: str, value: Any) -> None:
    with pytest.raises(SampleError, match="malformed record: "):
        tokens(FIELDS[field](value), byte_level)


def test_members_are_utf8_with_or_without_a_byte_order_mark() -> None:
    record = {"task": "caption", "caption": "caf\u00e9"}
    text = json.dumps(record, ensure_ascii=False)
    for mark in (b"", b"\xef\xbb\xbf"):
        assert decode_record("txt", mark + record["caption"].encode()) == parse_record(record)
        assert decode_record("json", mark + text.encode()) == parse_record(record)
    for suffix, data in (("txt", record["caption"]), ("json", text)):
        for encoding in ("utf-16", "latin-1"):
            with pytest.raises(SampleError, match=f"malformed {suffix}: not UTF-8 at byte"):
                decode_record(suffix, data.encode(encoding))


def test_no_text_becomes_a_special_token_and_none_is_lost(byte_level: Tokenizer) -> None:
    """Random texts of everything that tokens are spelled with, in every field; markup in dialogues alone."""
    rng = random.Random(0)
    atoms = [
        *SPECIAL_TOKENS[:5],
        *SPECIAL_TOKENS[-9:],
        "(1,2),(3,4)",
        "a",
        " ",
        "<",
        ">",
        "/",
        "ref",
        "\u72d7",
        "9",
    ]
    eos = byte_level.eos

    def specials(record: dict[str, Any]) -> list[int]:
        return [token for token in tokens(record, byte_level) if token >= eos]

    harmless = {field: specials(make("x")) for field, make in FIELDS.items()}
    rendered = 0
    for _ in range(300):
        text = "x" + "".join(rng.choice(atoms) for _ in range(rng.randint(1, 10))) + "x"
        for field, make in FIELDS.items():
            try:
                found, written = specials(make(text)), byte_level.decode(tokens(make(text), byte_level))
            except SampleError:
                assert field in ("user", "assistant")
                continue
            rendered += 1
            assert text in written
            if field not in ("user", "assistant"):
                assert found == harmless[field]
                continue
            pieces = [piece for piece in parse_markup(text) if piece.kind != "text"]
            assert len(found) == len(harmless[field]) + 2 * len(pieces)
            assert not {byte_level.img_pad, byte_level.img_start, byte_level.img_end} & set(found)
    assert rendered > 3200


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e400", HUGE, "null", "true", '"a"', '"NaN"', "[1]"]
)
@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize("task", ["referring", "region_caption", "grounded_caption", "ocr"])
def test_coordinates_are_finite_numbers(byte_level: Tokenizer, task: str, where: int, value: str) -> None:
    box = ["0", "0", "9", "9"]
    quad = [["0", "0"], ["9", "0"], ["9", "9"], ["0", "9"]]
    box[where] = quad[where][where % 2] = value
    written = "[" + ",".join(box) + "]"
    corners = ",".join(f"[{x},{y}]" for x, y in quad)
    data = {
        "referring": f'"phrase": "x", "boxes": [{written}]',
        "region_caption": f'"box": {written}, "caption": "x"',
        "grounded_caption": f'"caption": [{{"ref": "x", "boxes": [{written}]}}]',
        "ocr": f'"lines": [{{"text": "x", "quad": [{corners}]}}]',
    }[task]
    with pytest.raises(SampleError, match="malformed (record|json)"):
        decode_record("json", f'{{"task": "{task}", {data}}}'.encode())


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ((0, 0), (0, 0)),
        ((320, 240), (500, 500)),
        ((640, 480), (999, 999)),
        ((639.99, 479.99), (999, 999)),
        ((0.63, 0.479), (0, 0)),
        ((-5, 500), (0, 999)),
        ((6.4, 4.8), (10, 10)),
        ((1e308, -1e308), (999, 0)),
    ],
)
def test_coordinates_are_thousandths_rounded_down(
    point: tuple[float, float], expected: tuple[int, int]
) -> None:
    assert normalise(point, 640, 480) == expected


def box_records(box: list[float]) -> list[dict[str, Any]]:
    return [
        {"task": "referring", "phrase": "x", "boxes": [box]},
        {"task": "region_caption", "box": box, "caption": "x"},
        {"task": "grounded_caption", "caption": [{"ref": "x", "boxes": [[0, 0, 9, 9], box]}]},
    ]


@pytest.mark.parametrize(
    "box", [[5, 5, 5, 9], [9, 5, 5, 9], [5, 9, 9, 5], [1000, 0, 1001, 9], [-9, 0, 0, 9], [0, 1000, 9, 1001]]
)
def test_a_box_that_is_none_skips_the_sample(byte_level: Tokenizer, box: list[float]) -> None:
    for record in box_records(box):
        with pytest.raises(SampleError, match="empty or outside of the 1000x1000 image"):
            render(record, byte_level)


@pytest.mark.parametrize("box", [[-5, -5, 5, 9], [990, 990, 1e308, 1001], [0, 0, 1000, 1000]])
def test_a_box_over_the_border_is_clipped(byte_level: Tokenizer, box: list[float]) -> None:
    for record in box_records(box):
        assert "1000" not in byte_level.decode(render(record, byte_level).tokens)


def test_numbers_in_strings_are_numbers(byte_level: Tokenizer) -> None:
    for text, number in zip(
        box_records(["1", "2", "30.5", "40"]), box_records([1, 2, 30.5, 40]), strict=True
    ):
        assert render(text, byte_level) == render(number, byte_level)


def ocr(*corners: tuple[float, float]) -> dict[str, Any]:
    return {"task": "ocr", "lines": [{"text": "x", "quad": list(corners)}]}


TOP_LEFT, TOP_RIGHT, BOTTOM_RIGHT, BOTTOM_LEFT = (100, 100), (300, 110), (290, 200), (95, 190)


@pytest.mark.parametrize(
    ("corners", "reason"),
    [
        ((TOP_LEFT, BOTTOM_LEFT, BOTTOM_RIGHT, TOP_RIGHT), "not clockwise"),
        ((TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT), "not clockwise"),
        ((TOP_LEFT, BOTTOM_RIGHT, TOP_RIGHT, BOTTOM_LEFT), "not clockwise"),
        (((0, 0), (300, 0), (0, 50), (100, 200)), "not clockwise"),
        ((TOP_LEFT,) * 4, "empty"),
        (((1, 1), (2, 2), (3, 3), (4, 4)), "empty"),
        (((1100, 0), (1200, 0), (1200, 9), (1100, 9)), "outside of the 1000x1000 image"),
        (((0, -20), (9, -20), (9, -5), (0, -5)), "outside"),
        (((1e308, -1e308), (-1e308, -1e308), (-1e308, 1e308), (1e308, 1e308)), "empty"),
    ],
)
def test_a_quad_that_is_none_skips_the_sample(
    byte_level: Tokenizer, corners: tuple[tuple[float, float], ...], reason: str
) -> None:
    with pytest.raises(SampleError, match=rf"quad .* {reason}"):
        render(ocr(*corners), byte_level)


@pytest.mark.parametrize("first", range(4))
def test_a_quad_may_start_at_any_corner_and_reach_over_the_border(byte_level: Tokenizer, first: int) -> None:
    """Turned text begins where it is read from."""
    corners = [TOP_LEFT, TOP_RIGHT, BOTTOM_RIGHT, (-5, 190)]
    turned = corners[first:] + corners[:first]
    written = ",".join(f"({max(x, 0)},{y})" for x, y in turned)
    assert f"<quad>{written}</quad>" in byte_level.decode(render(ocr(*turned), byte_level).tokens)


def grounded(*parts: Any) -> dict[str, Any]:
    caption = [part if isinstance(part, str) else {"ref": part[0], "boxes": [BOX]} for part in parts]
    return {"task": "grounded_caption", "caption": caption}


@pytest.mark.parametrize(
    ("parts", "outside", "inside"),
    [
        (["A man and ", ("his dog",), " play."], " A man and [his dog] play.", " A man and[ his dog] play."),
        (["A man and", (" his dog",), " play."], " A man and [his dog] play.", " A man and[ his dog] play."),
        ([("A man ",), "and ", (" his dog ",)], " [A man] and  [his dog]", "[ A man] and [ his dog]"),
        ([("Woman",), " and ", ("dog",)], " [Woman] and [dog]", "[ Woman] and[ dog]"),
        ([(" Woman",), (" dog",)], " [Woman] [dog]", "[ Woman][ dog]"),
        (["\u4e00", ("\u72d7",), "\u3002"], " \u4e00[\u72d7]\u3002", " \u4e00[\u72d7]\u3002"),
        (["  A ", "man\n", ("x",), "", " \n"], " A man\n[x]", " A man\n[x]"),
        (["only text "], " only text", " only text"),
    ],
)
def test_no_blank_is_lost_between_text_and_phrase(
    byte_level: Tokenizer, parts: list[Any], outside: str, inside: str
) -> None:
    for where, expected in (("outside", outside), ("inside", inside)):
        renderer = Renderer(byte_level, 2, options=RenderOptions(ref_blank=where))  # type: ignore[arg-type]
        rendered = renderer.render(parse_record(grounded(*parts)), IMAGE)
        answer = byte_level.decode(rendered.tokens).partition("with grounding:")[2]
        written = expected.replace("[", "<ref>").replace("]", "</ref><box>(0,0),(9,9)</box>")
        assert answer == f"{written}<|endoftext|>"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "malformed json"),
        (
            b'{"task": "text", "text": "a", "b": ' + b"9" * 5000 + b"}",
            "string conversion: value has 5000 digits$",
        ),
        (b'{"task": "text", "text": "a", "b": {"c": 1, "c": 2}}', "malformed json: the key 'c' occurs twice"),
        (b"[" * 100000, "malformed json"),
        (b"[]", "malformed record"),
        (b"null", "malformed record"),
        (b'{"caption": "x"}', "malformed record: expected a task of caption, vqa.* found no task"),
        (b'{"task": "sing"}', "malformed record"),
        (b'{"task": "\\ud800"}', "malformed record"),
        (b'{"task": "vqa", "answer": "x"}', "vqa.question: Field required"),
        (b'{"task": "referring", "phrase": "x", "boxes": [[1, 2, 3]]}', "boxes.0.3: Field required"),
        (b'{"task": "referring", "phrase": "x", "boxes": []}', "at least 1"),
        (
            b'{"task": "ocr", "lines": [{"text": "x", "quad": [[1, 2], [3, 4], [5, 6]]}]}',
            "lines.0.quad.3: Field required",
        ),
        (b'{"task": "grounded_caption", "caption": []}', "at least 1"),
        (b'{"task": "grounded_caption", "caption": [{"ref": "x", "boxes": []}]}', "at least 1"),
    ],
)
def test_malformed_records_are_explained(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        decode_record("json", data)
