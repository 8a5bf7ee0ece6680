"""The field's words, in code, messages and documentation: private words that were given up do not come back."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = ("megatron_qwenvl", "tools", "launch", "slurm", "docs", "benchmarks", "examples")
PAGES = ("README.md", "CONTRIBUTING.md")
SUFFIXES = {".py", ".sh", ".sbatch", ".md", ".example"}

INSTEAD = {
    r"pictures?": "image",
    r"aside": "tmp_dir, under a temporary name",
    r"condemned": "stale",
    r"strangers?": "unexpected_files",
    r"unscattered": "full_sequence",
    r"carry_out\w*": "execute",
    r"poorest\w*": "balance_across_ranks",
    r"dealt|deals out|dealing out": "distributed",
    r"alike": "the same, equal",
    r"whoever": "the one that, the caller",
    r"sees to it": "makes sure",
    r"is to tell": "reports",
    r"go_on": "requeue, resume",
    r"is_main": "is_rank0",
    r"initialis\w+": "initialize",
    r"learned (?:tokens?|text|mask)": "loss mask, supervised",
}
"""Words that a reader who knows Megatron would have to learn here, and what the project says instead."""

ALLOWED = re.compile(r"[Pp]icture(?= {1,2}\d| \{| NUMBER|\|image)")
"""`Picture 1: <img>..</img>` is the published model's format of dialogues."""


def private_words(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, word and replacement of every word that was given up."""
    pattern = re.compile("|".join(rf"(?P<w{i}>\b(?:{word})\b)" for i, word in enumerate(INSTEAD)), re.I)
    instead = list(INSTEAD.values())
    for number, line in enumerate(text.splitlines(), start=1):
        for match in pattern.finditer(ALLOWED.sub("", line)):
            assert match.lastgroup is not None
            yield number, match[0], instead[int(match.lastgroup[1:])]


def test_words_that_were_given_up_do_not_come_back() -> None:
    files = [ROOT / page for page in PAGES]
    files += [path for place in PLACES for path in (ROOT / place).rglob("*") if path.suffix in SUFFIXES]
    assert len(files) > 200
    found = [
        f"{path.relative_to(ROOT)}:{line}: {word!r}, say {instead}"
        for path in sorted(files)
        for line, word, instead in private_words(path.read_text(encoding="utf-8"))
    ]
    assert found == [], "\n".join(found)


def test_a_private_word_is_named() -> None:
    text = 'Picture 1: <img>a.png</img>\nA picture of it.\nfolder.carry_out_import()\n"written aside"\n'
    assert [(line, word) for line, word, _ in private_words(text)] == [
        (2, "picture"),
        (3, "carry_out_import"),
        (4, "aside"),
    ]


NAMED_TWICE = {
    "main": "entry points of programs",
    "run": "entry points of programs",
    "parse_arguments": "entry points of programs",
    "T": "a type variable",
    "Shape": "the same type; the storage of checkpoints knows no model",
}
"""Names that several files define, with the reason."""


def public_names(tree: ast.Module) -> Iterator[str]:
    """Classes, functions and type aliases of a module that others may import."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            names = [name for name in names if name[0].isupper() and name != name.upper()]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def test_a_class_function_or_alias_has_one_meaning() -> None:
    places = defaultdict(list)
    for place in ("megatron_qwenvl", "slurm", "benchmarks", "launch", "tools"):
        for path in sorted((ROOT / place).rglob("*.py")):
            for name in public_names(ast.parse(path.read_text(encoding="utf-8"))):
                places[name].append(str(path.relative_to(ROOT)))
    assert len(places) > 500
    found = {name: files for name, files in places.items() if len(files) > 1 and name not in NAMED_TWICE}
    assert found == {}, "names that stand for two things"


ELSEWHERE = {
    "CLIPVisionCfg", "CLIPVisionConfig", "bbox", "custom_generate", "dp", "get_2d_sincos_pos_embed", "npy", "pax",
    "sun_path", "tarfile", "xml", "_per_device",
}  # fmt: skip
"""Names in docstrings that stand for something outside of the code, or for a part of a name."""


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """The text of every docstring, those below attributes included."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", ()) if not isinstance(node, ast.Lambda | ast.IfExp) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value


def identifiers(tree: ast.AST, apart: set[int]) -> Iterator[str]:
    """Every name in the code, and every word in a text that is no docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in apart:
            yield from re.findall(r"\w+", node.value)
        for field in ("id", "attr", "arg", "name"):
            if isinstance(value := getattr(node, field, None), str):
                yield from value.split(".")


def test_names_in_docstrings_exist() -> None:
    named: list[tuple[str, str]] = []
    known = set(ELSEWHERE)
    files = [*(ROOT / "megatron_qwenvl").rglob("*.py"), *(ROOT / "slurm").rglob("*.py")]
    for path in sorted(files):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = list(docstrings(tree))
        known |= {path.stem, path.parent.name, *identifiers(tree, {id(text) for text in texts})}
        for text in texts:
            place = f"{path.relative_to(ROOT)}:{text.lineno}"
            named += [(place, name) for name in re.findall(r"`([A-Za-z_]\w*)`", str(text.value))]
    assert len(named) > 500
    found = [f"{place}: {name}" for place, name in named if name not in known]
    assert found == [], "\n".join(found)


def test_every_room_names_its_modules() -> None:
    missing = []
    for file in sorted((ROOT / "megatron_qwenvl").glob("*/**/__init__.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        below = {path.stem for path in file.parent.glob("*.py")} - {"__init__"}
        if file.parent.name not in ("commands", "runtime"):  # named for what they are, one by one
            missing += [f"{file.relative_to(ROOT)}: {name}" for name in sorted(below) if name not in text]
        assert text, file
    assert missing == [], "\n".join(missing)


_BARE_STAGE = re.compile(
    r"(?<![\w`./-])(?<!training )(?<!pipeline )(?<!three )(?<!, next )stages?(?! ?\d)(?![\w`./:=-])", re.I
)
"""A stage of which it is not said whether it is one of the training or one of the pipeline. The three stages are the
paper's; `next stage` in a list is the conversion."""


def bare_stages(text: str) -> list[str]:
    """Find these in prose; names and blocks of code are left out."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    prose = " ".join(
        re.sub(r"^\w[\w, ]*  +", "", text, flags=re.M).split()
    )  # without names of modules in a list
    return [prose[max(0, at.start() - 40) : at.end() + 20] for at in _BARE_STAGE.finditer(prose)]


def test_a_stage_is_one_of_training_or_of_the_pipeline() -> None:
    found = []
    for path in sorted((ROOT / "megatron_qwenvl").rglob("*.py")):
        for text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            found += [f"{path.relative_to(ROOT)}:{text.lineno}: {s}" for s in bare_stages(str(text.value))]
    for path in [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / page for page in PAGES)]:
        found += [f"{path.relative_to(ROOT)}: {s}" for s in bare_stages(path.read_text(encoding="utf-8"))]
    assert found == [], "\n".join(found)
    assert bare_stages("The last\n    stage, stage 1, a pipeline\n stage, `stage`") == [
        "The last stage, stage 1, a pipelin"
    ]


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found, opening = [], re.compile(r"\s*(What|How|Why|Where|When|On|For|From|Those|That|All that)\b")
    for place in ("megatron_qwenvl", "slurm", "tools", "launch", "benchmarks", "examples"):
        for path in sorted((ROOT / place).rglob("*.py")):
            for text in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
                if match := opening.match(str(text.value)):
                    found.append(f"{path.relative_to(ROOT)}:{text.lineno}: {match[1]}")
    assert found == [], "\n".join(found)
