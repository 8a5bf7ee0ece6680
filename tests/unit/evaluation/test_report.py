"""The HTML report: self-contained, safe with any text, and true to the images, shapes and curves it is given."""

from __future__ import annotations

import base64
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from megatron_qwenvl.data.errors import SampleError
from megatron_qwenvl.data.records.tasks import VQA, Caption, Referring
from megatron_qwenvl.demo.examination import Question, show_examples
from megatron_qwenvl.evaluation.charts import HEIGHT, WIDTH, Curve, line_chart
from megatron_qwenvl.evaluation.curves import loss_chart
from megatron_qwenvl.evaluation.report import Chart, Example, Report, box_polygon, find_shapes, render_report

VOID = {"meta", "img", "br"}
HOSTILE = "<script>alert(1)</script> \" ' & </p> </svg>"


class Page(HTMLParser):
    """Checks that tags nest, and collects attributes by tag and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, list[dict[str, str | None]]] = {}
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.setdefault(tag, []).append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.setdefault(tag, []).append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def png(width: int = 40, height: int = 20, colour: tuple[int, int, int] = (200, 30, 60)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "PNG")
    return out.getvalue()


def test_the_page_needs_nothing_from_outside_and_runs_nothing() -> None:
    html = render_report(
        Report(
            HOSTILE, HOSTILE, [Chart(HOSTILE, [Curve(HOSTILE, [(0, 1.0)])], HOSTILE, HOSTILE)],
            {HOSTILE: HOSTILE}, {HOSTILE: [Example(png(), HOSTILE, HOSTILE, HOSTILE)]},
        )
    )  # fmt: skip
    page = Page(html)
    assert "script" not in page.tags and "link" not in page.tags
    assert "http" not in html
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.tags["img"])
    assert page.text.count(HOSTILE) >= 8  # shown as it is


def test_an_image_is_shown_with_its_own_colours_and_proportions() -> None:
    page = Page(render_report(Report("t", examples={"s": [Example(png(40, 20), "q", "a")]})))
    image = page.tags["img"][0]
    assert image["style"] == "aspect-ratio: 40 / 20"
    data = base64.b64decode(str(image["src"]).partition(",")[2])
    assert (np.asarray(Image.open(io.BytesIO(data))) == (200, 30, 60)).all()


def test_an_image_that_cannot_be_decoded_is_an_error() -> None:
    with pytest.raises(SampleError):
        render_report(Report("t", examples={"s": [Example(b"no image", "q", "a")]}))


def test_shapes_of_answers_are_found() -> None:
    assert find_shapes("<box>(10,20),(30,40)</box> and <box>(1, 2) , (3, 4)</box>") == (
        ((10, 20), (30, 20), (30, 40), (10, 40)),
        ((1, 2), (3, 2), (3, 4), (1, 4)),
    )
    assert find_shapes("<quad>(1,2),(3,4),(5,6),(7,8)</quad>") == (((1, 2), (3, 4), (5, 6), (7, 8)),)
    assert find_shapes("(1,2) then (3,4),(5,6),(7,8) or nothing") == ()


def test_true_and_predicted_boxes_are_drawn_over_the_image_of_a_referring_question() -> None:
    record = Referring(phrase="the red one", boxes=((10, 5, 20, 15),))
    question = Question(record, (("png", png(40, 20)),))
    asked: list[Question] = []

    def answer(questions: object) -> list[str]:
        asked.extend(questions)  # type: ignore[call-overload]
        return ["<box>(260,250),(500,750)</box>"]

    examples = show_examples(answer, [question])
    assert isinstance(asked[0].record, Referring) and asked[0].record.boxes is None  # the model is not told
    assert examples[0].right
    page = Page(render_report(Report("t", examples={"s": examples})))
    shapes = {str(shape["class"]): shape["points"] for shape in page.tags["polygon"]}
    assert shapes == {
        "true": "250,250 500,250 500,750 250,750",
        "predicted": "260,250 500,250 500,750 260,750",
    }
    assert page.tags["svg"][0]["viewbox"] == "0 0 1000 1000"


@pytest.mark.parametrize(("found", "right"), [("Red.", True), ("blue", False)])
def test_right_and_wrong_answers_are_marked(found: str, right: bool) -> None:
    records = [VQA(question="Which colour?", answer="red"), Caption(caption="red")]
    questions = [Question(record, (("png", png()),)) for record in records]
    examples = show_examples(lambda asked: [found] * len(asked), questions)
    assert [example.right for example in examples] == [right, right]
    html = render_report(Report("t", examples={"s": examples}))
    assert html.count(f'class="card {"right" if right else "wrong"}"') == 2


def test_a_chart_places_its_points_and_leaves_gaps() -> None:
    svg = line_chart(
        [Curve("a", [(0, 4.0), (5, math.nan), (10, 0.0), (20, 2.0)], marked=True)], "step", "loss"
    )
    root = ElementTree.fromstring(svg)
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in root.iter("circle")]
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert x1 - x0 == pytest.approx(x2 - x1) and y1 - y2 == pytest.approx(y2 - y0)  # 0, 10, 20 and 4, 0, 2
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in dots)
    path = next(path for path in root.iter("path") if path.get("fill") == "none").attrib["d"]
    assert path.count("M") == 2 and path.count("L") == 1


@pytest.mark.parametrize("points", [[], [(0, math.nan)]])
def test_a_chart_without_values_says_so(points: list[tuple[float, float]]) -> None:
    assert "No values" in line_chart([Curve("a", points)], "step", "loss")


@pytest.mark.parametrize(
    "points", [[(3, 1.0)], [(0, 0.0), (1, 0.0)], [(0, 1e-9), (1, 1e9)], [(0, -2.0), (9, 3.0)]]
)
def test_a_chart_of_any_range_can_be_drawn(points: list[tuple[float, float]]) -> None:
    ElementTree.fromstring(line_chart([Curve("a", points)], "step", "loss"))


def test_curves_come_from_the_metrics_of_a_run(tmp_path: Path) -> None:
    records = [
        {"kind": "start", "step": 0}, {"kind": "train", "step": 0, "loss": 3.0},
        {"kind": "train", "step": 1, "loss": None}, {"kind": "train", "step": 2, "loss": 2.0},
        {"kind": "validation", "step": 3, "loss": 1.5}, {"kind": "train", "step": 2, "loss": 2.5},
    ]  # fmt: skip
    text = "\n".join(map(json.dumps, records)) + '\n{"kind": "train", "st'  # torn by a crash
    (tmp_path / "metrics.jsonl").write_text(text)
    training, validation = loss_chart(tmp_path, "stage1").lines
    (one, two, three) = training.points
    assert one == (1, 3.0) and two[0] == 2 and math.isnan(two[1])
    assert three == (3, 2.5)  # trained again after going back: the last one counts
    assert list(validation.points) == [(3, 1.5)]


def test_curves_leave_out_what_a_run_went_back_over(tmp_path: Path) -> None:
    records = [{"kind": "train", "step": step, "loss": 9.0} for step in range(6)]
    records += [
        {"kind": "validation", "step": 2, "loss": 1.5},
        {"kind": "validation", "step": 4, "loss": 1.5},
    ]
    records += [{"kind": "rewind", "step": 2}, {"kind": "train", "step": 2, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    training, validation = loss_chart(tmp_path, "stage1").lines
    assert list(training.points) == [(1, 9.0), (2, 9.0), (3, 1.0)]
    assert list(validation.points) == [(2, 1.5)]


def test_a_run_without_metrics_gives_an_empty_chart(tmp_path: Path) -> None:
    assert not loss_chart(tmp_path, "stage1").lines


def test_a_box_has_four_corners() -> None:
    assert box_polygon((1, 2, 3, 4)) == ((1, 2), (3, 2), (3, 4), (1, 4))
