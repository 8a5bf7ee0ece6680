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
