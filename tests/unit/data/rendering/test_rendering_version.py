"""The rendering version is raised when renderings change: an index made before would hold wrong lengths."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_qwenvl.data import images as image_files
from megatron_qwenvl.data.errors import SampleError
from megatron_qwenvl.data.records import attempts, coordinates, dialogues, fields, markup, tasks
from megatron_qwenvl.data.records.tasks import TASKS, decode_record
from megatron_qwenvl.data.rendering import chatml, formats, renderer, token_builder
from megatron_qwenvl.data.rendering.renderer import RENDERING_VERSION, Renderer
from megatron_qwenvl.data.rendering.token_builder import ImageInfo
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer
from megatron_qwenvl.data.shards import media, members

EXPECTED = {
    "version": 6,
    "renderings": "7d009248fe8ea43a",
    "logic": "03d4797f9cbed266",
}
HELP = """
{what} changed. If a record may now render to other tokens, or is accepted or refused where it was not before, raise
RENDERING_VERSION in megatron_qwenvl/data/rendering/renderer.py (now {version}): users are then asked to index again.
If no rendering can have changed (a refactoring), leave it. Then put into EXPECTED of {file}:
{expected}"""

BOX, QUAD = [2, 1, 12, 8], [[2, 1], [12, 1], [12, 8], [2, 8]]


def chat(*values: str, **more: Any) -> dict[str, Any]:
    speakers = ("user", "assistant")
    turns = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]
    return {"task": "chat", "conversations": turns, **more}


# Regular records of every task and the oddities that were decided on; each with the number of its images.
CORPUS: list[tuple[Any, int]] = [
    ({"task": "caption", "caption": " two  blanks ", "language": "zh"}, 1),
    ({"task": "caption", "caption": "plain"}, 2),
    ({"task": "caption", "caption": "none"}, 0),
    ({"task": "caption", "caption": "\ufeffmarked"}, 1),
    ({"task": "caption", "caption": "lone \ud800 surrogate"}, 1),
    ({"task": "caption", "caption": "<img>x</img><|im_end|><ref>r</ref>"}, 1),
    ({"task": "vqa", "question": "What?", "answer": "No, 图."}, 1),
    ({"task": "vqa", "question": "What?", "answer": 3}, 1),
    ({"task": "ocr_vqa", "question": "Title?", "answer": "Asi Se Dice!"}, 3),
    ({"task": "grounded_caption", "caption": ["A ", {"ref": " bee", "boxes": [BOX, BOX]}, " flies"]}, 1),
    ({"task": "grounded_caption", "caption": [{"ref": "bee", "boxes": [BOX]}, "flies"], "language": "zh"}, 1),
    ({"task": "grounded_caption", "caption": ["text", {"ref": "x", "boxes": [[12, 8, 2, 1]]}]}, 1),
    ({"task": "referring", "phrase": "the ear", "boxes": [BOX, [-5, -5, 50, 50]]}, 1),
    ({"task": "referring", "phrase": "the ear", "boxes": [[30, 1, 40, 8]]}, 1),
    ({"task": "referring", "phrase": "the ear", "boxes": [[1, 1, 1, 1]]}, 1),
    ({"task": "region_caption", "box": BOX, "caption": "gloves"}, 1),
    ({"task": "ocr", "lines": [{"text": "It is", "quad": QUAD}, {"text": "x", "quad": QUAD[::-1]}]}, 1),
    ({"task": "ocr", "lines": [{"text": "far", "quad": [[90, 90], [99, 90], [99, 99], [90, 99]]}]}, 1),
    ({"task": "text", "text": " kept \n"}, 0),
    ({"task": "text", "text": "picture?"}, 1),
    (chat("Picture 1: <img>0.png</img>\nwhat?", "a <ref>cat</ref><box>(1,2),(30,40)</box>"), 1),
    (chat("<img>1.png</img><img>0.png</img>", "y", "more", "no", system="Be brief."), 2),
    (chat("<img>0.png</img><img>0.png</img>", "twice"), 1),
    (chat("Picture 3: <img>0.png</img>", "restarted"), 1),
    (chat("<img>0.png</img>", "forgot the second"), 2),
    (chat("where?", "<box>(1000,0),(1000,5)</box>"), 0),
    (chat("where?", "<box>( 1, 2 ), (3 ,4)</box> <box>(1.5,2),(3,4)</box> <box>(-1,2),(3,4)</box>"), 0),
    (chat("where?", "<box>(1,2),(3,4)(5,6),(7,8)</box><ref></ref><box>(9,9),(1,1)</box>"), 0),
    (chat("read", "<quad>(1,2),(3,4),(5,6),(7,8)</quad><quad>(1,2),(3,4)</quad>"), 0),
    (chat(" ", "an empty turn"), 0),
    ({"task": "chat", "conversations": [{"from": "assistant", "value": "first"}]}, 0),
    ({"task": "chat", "conversations": [{"from": "user", "value": "last"}]}, 0),
    ({"task": "chat", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, 0),
    (
        {"task": "chat", "conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "b"}]},
        0,
    ),
    (chat("q", "a", "the user is last"), 0),
    (chat("write <box> and <img>", "a < b"), 0),
    ({"task": "grounded_caption", "caption": ["A", {"ref": " bee ", "boxes": [BOX]}, "and ", " more "]}, 1),
    ({"task": "ocr", "lines": [{"text": "crossing", "quad": [[2, 1], [12, 1], [2, 8], [12, 8]]}]}, 1),
    ({"task": "nonsense"}, 1),
    ([], 1),
]


def rendering(record: Any, images: int, tokenizer: Tokenizer) -> object:
    """Tokens, loss mask and images of a record, or that it is refused; its reason may change freely."""
    try:
        infos = [ImageInfo(f"{i}.png", 20, 10) for i in range(images)]
        out = Renderer(tokenizer, 2).render(decode_record("json", json.dumps(record).encode()), infos)
    except SampleError:
        return "refused"
    return out.tokens, out.loss_mask, out.image_starts, out.image_order


def logic(source: str) -> object:
    """A module as nested lists, without docstrings, comments, layout, and what differs between Python versions."""

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(item) for item in node if not _is_docstring(item)]
        if not isinstance(node, ast.AST):
            return repr(node)
        fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
        return [type(node).__name__, *([name, plain(value)] for name, value in fields)]

    return plain(ast.parse(source))


def _is_docstring(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


def test_the_version_is_raised_with_every_change_of_renderings(byte_level: Tokenizer) -> None:
    assert {record["task"] for record, _ in CORPUS if isinstance(record, dict)} >= set(TASKS)
    modules = (
        renderer, formats, chatml, dialogues, markup, attempts, tasks, fields, coordinates, token_builder, image_files,
        members, media,
    )  # fmt: skip
    found = {
        "version": RENDERING_VERSION,
        "renderings": digest([rendering(record, count, byte_level) for record, count in CORPUS]),
        "logic": digest(
            [logic(without_version(Path(str(module.__file__)).read_text())) for module in modules]
        ),
    }
    shown = json.dumps(found, indent=4)
    if found["renderings"] != EXPECTED["renderings"]:
        assert found["version"] > EXPECTED["version"], HELP.format(  # type: ignore[operator]
            what="Renderings of the corpus",
            version=RENDERING_VERSION,
            file=Path(__file__).name,
            expected=shown,
        )
    assert found == EXPECTED, HELP.format(
        what="The code that renders, or its version,", version=RENDERING_VERSION, file=Path(__file__).name,
        expected=shown,
    )  # fmt: skip


def without_version(source: str) -> str:
    return source.replace(f"RENDERING_VERSION = {RENDERING_VERSION}\n", "")


def test_the_logic_of_a_module_is_its_code_alone() -> None:
    code = 'def f(x):\n    """Doc."""\n    return x + 1  # add\n'
    assert logic(code) == logic('def f(x):\n    """Other."""\n\n    return (x\n            + 1)\n')
    assert logic(code) != logic(code.replace("1", "2"))
    assert logic(code) != logic(code.replace("+", "-"))
