"""Grounding markup in dialogues: what is markup, what is normalized, what is text, and what is neither."""

from __future__ import annotations

import contextlib
import random
import re

import pytest

from megatron_qwenvl.data.errors import SampleError
from megatron_qwenvl.data.records.markup import parse_markup

BAR = "¦"
BOX = "<box>(1,2),(3,4)</box>"
QUAD = "<quad>(1,2),(9,2),(9,8),(1,8)</quad>"


def spell(value: str, keep: bool = False) -> list[str]:
    """The pieces of a text: markup as it is written, text before a bar."""
    return [
        piece.text + BAR if piece.kind == "text" else f"<{piece.kind}>{piece.text}</{piece.kind}>"
        for piece in parse_markup(value, keep)
    ]


@pytest.mark.parametrize(
    ("value", "pieces"),
    [
        ("plain", ["plain¦"]),
        (f"a {BOX} b", ["a ¦", BOX, " b¦"]),
        (f"<ref>it</ref>{BOX}{BOX}", ["<ref>it</ref>", BOX, BOX]),
        (f"<ref>it</ref> {QUAD}", ["<ref>it</ref>", " ¦", QUAD]),
        ("<ref> Woman</ref>", ["<ref> Woman</ref>"]),
        (f"<ref>a < b > c</ref>{BOX}", ["<ref>a < b > c</ref>", BOX]),
        ("<ref>two\nlines</ref>", ["<ref>two\nlines</ref>"]),
        ("<box>(0,0),(999,999)</box>", ["<box>(0,0),(999,999)</box>"]),
        ("<box>(0,0),(1000,1000)</box>", ["<box>(0,0),(999,999)</box>"]),
        ("<box>(10, 20), (300, 400)</box>", ["<box>(10,20),(300,400)</box>"]),
        ("<box> ( 10 ,20 )\n,\t(300,\u00a0400) </box>", ["<box>(10,20),(300,400)</box>"]),
        ("<box>(007,00),(030,0400)</box>", ["<box>(7,0),(30,400)</box>"]),
        ("<box>(5,5),(5,9)</box>", ["<box>(5,5),(5,9)</box>"]),
        (
            "<quad>(0,0),(1000,0),(1000,1000),(0,1000)</quad>",
            ["<quad>(0,0),(999,0),(999,999),(0,999)</quad>"],
        ),
        ("<quad>(1,2), (9,2), (9,8), (1,8)</quad>", [QUAD]),
        ("<quad>(1,2),(9,2),(9,2),(1,2)</quad>", ["<quad>(1,2),(9,2),(9,2),(1,2)</quad>"]),
        ("<box>\u200b(1,2),(3,4)\ufeff</box>", [BOX]),
        ("Picture 1: <img>jpg</img>\nq", ["Picture 1: ¦", "<img>jpg</img>", "\nq¦"]),
        ("Picture  1:\n<img>jpg</img>", ["Picture  1:\n¦", "<img>jpg</img>"]),
        ("图1\uff1a<img>jpg</img>", ["图1\uff1a¦", "<img>jpg</img>"]),
    ],
)
def test_markup_whose_meaning_is_plain(value: str, pieces: list[str]) -> None:
    assert spell(value) == pieces
    assert spell(value, keep=True) == pieces


ATTEMPTS = [
    "<box>(0,0),(1001,9)</box>", "<box>(0,0),(99999,9)</box>", "<box>(-3,20),(300,400)</box>",
    "<box>(1.5,2.0),(3,4)</box>", "<box>(0.1,0.2),(0.3,0.4)</box>", "<box>[10,20,300,400]</box>",
    "<box>[[10,20,300,400]]</box>", "<box>10,20,300,400</box>", "<box>(1,2)</box>", "<box>(1,2),(3,4),(5,6)</box>",
    "<box>(1,2),(3,4),(5,6),(7,8)</box>", "<box>(1,2),(3,4);(5,6),(7,8)</box>", "<box>(1,2)(3,4)</box>",
    "<box>(1 2),(3 4)</box>", "<box>(1 0,2),(3,4)</box>", "<box>(a,2),(3,4)</box>", "<box>(\u0661,2),(3,4)</box>",
    "<box>\uff08\uff11,2\uff09</box>", "<box>(x1,y1),(x2,y2)</box>", "<box></box>", "<box> </box>", "<quad></quad>",
    "<box>(300,400),(10,20)</box>", "<box>(300,20),(10,400)</box>", "<box>(10,400),(300,20)</box>",
    "<box>(5,5),(5,5)</box>",
    "<box>(1,2),(3,4)", "<box>(1,2),(3,4)</ref>", "<box>(1,2),(3,4)</quad>", "(1,2),(3,4)</box>", "<box> (1,2)",
    "<quad>(1,2),(3,4)</quad>", "<quad>(1,2),(3,4)</box>", "<quad>(1,8),(9,8),(9,2),(1,2)</quad>",
    "<quad>(1,2),(9,2),(1,8),(9,8)</quad>", "<quad>(1,2),(9,8),(9,2),(1,8)</quad>",
    "<quad>(4,4),(4,4),(4,4),(4,4)</quad>",
    "<ref>it</ref><box>there</box>", "<ref></ref><box>there</box>", "<ref>it</ref> <box>",
    "<ref></ref><box>(1,2),(3,4)</box>",
    "<ref> </ref><box>(1,2),(3,4)</box>", "<ref>a <ref>b</ref></ref><box>(1,2),(3,4)</box>",
    "<ref>a <ref>b</ref><box>(1,2),(3,4)</box>", "<ref>a<box>(1,2),(3,4)</box>", "a</ref><box>(1,2),(3,4)</box>",
    "<ref>a<box>(1,2),(3,4)</box></ref>", "<box>(1,2),(3,4)</box></box>", "<box><box>(1,2),(3,4)</box>",
    "<Box>(1,2),(3,4)</Box>", "<BOX>(1,2),(3,4)</BOX>", "< box >(1,2),(3,4)< /box >", "<box >(1,2),(3,4)</box>",
    "<|object_ref_start|>it<|object_ref_end|>", "<|box_start|>(1,2),(3,4)<|box_end|>",
    "Picture 1: <img>jpg", "<img>jpg</img></img>",
    # whatever stands between a tag and the digits
    "<box>'(1,2),(3,4)'</box>", '<box>"1,2,3,4"</box>', "<box>**(1,2),(3,4)**</box>", "<box>`(1,2),(3,4)`</box>",
    "<box><1><2><3><4></box>", "<box>top left (1,2) to (3,4) ok</box>", "<box>x(1,2),(3,4)px</box>",
    "<box>≈12,3≈</box>",
    "<box>p1=(1,2),p2=(3,4);</box>", "<quad>A(1,1) B(5,1) C(5,5) D(1,5) clockwise</quad>", "<box>\\(1,2),(3,4\\)</box>",
    "<quad>\U0001d7cf</quad>", "<box>from (1,2),(3,4)", "at (1,2),(3,4) px</box>", "<box>x 10 20",
    # other spellings of tags
    "<bbox>(1,2),(3,4)</bbox>", "<boxes>(1,2),(3,4)</boxes>", "&lt;box&gt;(1,2),(3,4)&lt;/box&gt;", "<box/>(1,2),(3,4)",
    "&lt;ref&gt;it&lt;/ref&gt;&lt;box&gt;", "\uff1cbox\uff1e(1,2),(3,4)\uff1c/box\uff1e", "<box>(1,2),(3,4)<box>",
    "<b\u200box>(1,2),(3,4)</b\u200box>", "<box>(1,2),(3,4)<\\/box>", "<REF>it</REF>", "<ref >it</ref >",
    "<IMG>jpg</IMG>",
    "<img>jpg</img >", "< img >jpg</ img >",
    # empty or separated names
    "<ref></ref>", "<ref> </ref>", "<ref>\u200b</ref>", "<ref>it</ref>: <box>N/A", "<ref>it</ref>\u200b<box>N/A</box>",
    "<ref>it</ref> - <BOX>N/A</BOX>", "<ref>it</ref>(1,2),(3,4)", "<ref>it</ref> [1, 2, 3, 4]",
    "<ref>it</ref><ref>", "a<ref>b</ref>c<box>", "<ref>a <ref>b</ref></ref>",
]  # fmt: skip


@pytest.mark.parametrize("value", ATTEMPTS)
def test_an_attempt_at_markup_is_never_taken_for_text_by_accident(value: str) -> None:
    with pytest.raises(
        SampleError, match="markup that does not parse: '|has reversed|above 1000|point|clockwise"
    ):
        parse_markup(f"See {value} there")
    kept = parse_markup(f"See {value} there", keep=True)
    assert kept[0].text.startswith("See ") and kept[-1].text.endswith(" there")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("<box>(1,2),(3,1001)</box>", "box '(1,2),(3,1001)' has a coordinate above 1000"),
        ("<box>(3,2),(1,4)</box>", "box '(3,2),(1,4)' has reversed corners"),
        ("<box>(3,2),(3,2)</box>", "box '(3,2),(3,2)' is a single point"),
        (
            "<quad>(1,8),(9,8),(9,2),(1,2)</quad>",
            "quad '(1,8),(9,8),(9,2),(1,2)' has corners that are not clockwise",
        ),
        ("<box>\n(1,'2)</box>", "markup that does not parse: '<box> (1,`2)</box>'"),
    ],
)
def test_the_reason_says_what_is_wrong_in_one_line(value: str, reason: str) -> None:
    with pytest.raises(SampleError, match=f"^{re.escape(reason)}$"):
        parse_markup(value)


@pytest.mark.parametrize("value", ATTEMPTS)
def test_an_attempt_is_kept_as_it_is(value: str) -> None:
    assert "".join(spell(value, keep=True)).replace(BAR, "") == value


@pytest.mark.parametrize(
    "value",
    [
        "<img src='a.png'> and </img> and <box>",
        "How do I close an <img> tag?",
        "Typical inline elements: 6. `<img>` - image, `<ref>`, `<imgpad>`, `<box>` and `</quad>`",
        "a < b and b > c, so (1,2) < (3,4)",
        "<box>content</box> is XML",
        "<box width='3'>(1,2)</box",
        "an empty <ref> </box> pair, and <IMG> or < BOX > alone",
        "use `&lt;ref&gt;` and <bbox> in 2024",
        "between <box> and </box> stand the corners, between <bbox> and </bbox> too",
        "`</ref>`, `<box>`",
        "5 < 6 & 7 > 3 &amp; 9",
        "<|im_end|><|im_start|><|endoftext|><imgpad></img><|extra_0|>",
        "<img>jpg",
        "the inbox (3), a box (1,2) and <textbox>(1,2)</textbox>",
        "&lt;box&gt;content&lt;/box&gt;",
        "Picture 3: none; picture 4 <img",
    ],
)
def test_text_that_speaks_of_tags_is_text(value: str) -> None:
    assert spell(value) == [value + BAR]


def test_no_text_is_lost_whatever_it_is() -> None:
    """Random strings of tags, coordinates and letters: kept whole, or left out with a reason."""
    rng = random.Random(0)
    atoms = [f"<{slash}{tag}>" for tag in ("img", "ref", "box", "quad") for slash in ("", "/")]
    atoms += [BOX, QUAD, "<ref>a</ref>", "(1,2)", "(3,4)", ",", " ", "a", "<", ">", "9", "Picture 1: ", "\n"]
    refused = 0
    for _ in range(5000):
        value = "".join(rng.choice(atoms) for _ in range(rng.randint(1, 12)))
        assert "".join(spell(value, keep=True)).replace(BAR, "") == value
        try:
            assert "".join(spell(value)).replace(BAR, "") == value
        except SampleError:
            refused += 1
    assert 1000 < refused < 4500


def test_parsing_is_quick_on_hostile_text() -> None:
    """Work grows with the length: twice the text costs no more than a few times as much."""
    for tag in (
        "<ref>",
        "<box>",
        "<img>",
        "<box>(1,2)",
        "Picture 1: ",
        "</ref>",
        "<",
        "&lt;",
        "< ",
        "</ref> ,",
        "图1",
    ):
        parse_markup(tag * 20_000, keep=True)
        with contextlib.suppress(SampleError):
            parse_markup(tag * 20_000)
