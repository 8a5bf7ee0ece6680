"""The documentation: it builds without a broken link, its generated parts are current, and what it names exists."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .test_architecture import ROOMS

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
CODE = re.compile(r"`([^`\n]+)`")
SOURCE_FILE = re.compile(r"(?:[\w.-]+/)+[\w.-]+\.(?:py|sh|sbatch|md|toml|txt|yml|example)")
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)")
SOMEBODY_ELSES = ("RUN/", "OUT/", "DIR/", "runs/", "weights/", "data/demo", "/")
"""Beginnings of paths that are not of the repository."""


def build(project: Path, site: Path) -> tuple[int, str]:
    """Exit code and messages of a strict build of `project`."""
    command = [sys.executable, "-m", "properdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=project, text=True, capture_output=True, check=False)
    return done.returncode, done.stderr


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    code, messages = build(ROOT, tmp_path / "site")
    assert code == 0, messages
    built = {page.name for page in (tmp_path / "site").glob("*.html")}
    assert {page.with_suffix(".html").name for page in (ROOT / "docs").glob("*.md")} <= built
    for page in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert loaded == [], f"{page.name} needs a network"
        assert "mermaid" not in page.read_text(), f"{page.name}: no script on the site draws this"


def test_broken_links_and_anchors_fail_the_build(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "properdocs.yml", tmp_path)
    with (tmp_path / "docs/index.md").open("a") as page:
        page.write("\n[a](no_such_page.md) [b](running.md#no-such-anchor)\n")
    (tmp_path / "docs/unlisted.md").write_text("# Not in the navigation\n")
    code, messages = build(tmp_path, tmp_path / "site")
    assert code == 1
    for missing in ("no_such_page.md", "#no-such-anchor", "unlisted.md"):
        assert missing in messages


def generator(name: str) -> ModuleType:
    """The script docs/`name`.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("script", "file"),
    [("generate_configuration", "configuration.md"), ("generate_job_states", "job_states.svg")],
)
def test_a_generated_part_is_current(script: str, file: str) -> None:
    current = (ROOT / "docs" / file).read_text(encoding="utf-8") == generator(script).render()
    assert current, f"docs/{file} is not current: run `python docs/{script}.py`"


def test_an_arrow_that_cannot_be_drawn_is_named() -> None:
    states = generator("generate_job_states")
    states.ROUTES.pop(((states.State.FAILED,), states.State.REQUEUED))
    with pytest.raises(ValueError, match="failed -> requeued$"):
        states.render()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = {
        path for code in CODE.findall(page.read_text(encoding="utf-8")) for path in SOURCE_FILE.findall(code)
    }
    missing = [
        path
        for path in sorted(named)
        if not path.startswith(SOMEBODY_ELSES)
        and not any((folder / path).exists() for folder in (ROOT, ROOT / "megatron_qwenvl", ROOT / "docs"))
    ]
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_pages_outside_of_the_site(page: str) -> None:
    targets = LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith(("http:", "https:")) and not (ROOT / t).exists()]
    assert missing == []


@functools.cache
def texts_of_the_code() -> str:
    """All texts of the Python code, placeholders left out, and the shell scripts."""
    found = []
    for folder in ("megatron_qwenvl", "tools", "launch", "slurm"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            found += [
                node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
    scripts = [path for folder in ("launch", "slurm") for path in sorted((ROOT / folder).glob("*.*h"))]
    return "\0".join([*found, *(path.read_text(encoding="utf-8") for path in scripts)])


def unknown_parts(message: str) -> list[str]:
    """The fixed parts of a quoted message that no text of the code holds; `...` stands for what varies."""
    parts = [part.strip(" :;,().") for part in message.split("...")]
    assert any(len(part) >= 8 for part in parts), f"too little of {message!r} is fixed"
    return [part for part in parts if part not in texts_of_the_code()]


QUOTED = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_exists(message: str) -> None:
    assert unknown_parts(message) == []


def test_an_invented_message_is_noticed() -> None:
    assert len(QUOTED) > 50
    assert unknown_parts("damaged checkpoint: ... is bored of training") == ["is bored of training"]


def test_the_house_is_drawn_and_listed_as_it_is() -> None:
    package = ROOT / "megatron_qwenvl"
    rooms = {path.parent.relative_to(package) for path in package.glob("*/**/__init__.py")}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    drawn = set(
        re.findall(r'class="name"[^>]*>([^<]+)<', (ROOT / "docs/house.svg").read_text(encoding="utf-8"))
    )
    assert drawn == {room.name for room in rooms} | modules
    table = re.findall(r"^\| `([\w.]+)` \| (.+) \|$", (ROOT / "docs/architecture.md").read_text(), re.M)
    listed = {name for name, _ in table} | {
        room for _, text in table for room in re.findall(r"`(\w+)` \(", text)
    }
    assert listed == drawn


def test_the_map_in_the_readme_is_the_tree() -> None:
    package = ROOT / "megatron_qwenvl"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^```\nmegatron_qwenvl/\n(.*?)^```", readme, re.M | re.S)
    inside = set(re.findall(r"^  ([\w.]+)/? ", tree, re.M))
    assert inside == rooms | modules
    early = {"config.schema", "checkpoint.storage"}
    order = list(dict.fromkeys(room.partition(".")[0] for room in ROOMS if room not in early))
    assert re.findall(r"^  (\w+)(?:/|\.py) ", tree, re.M) == order
    assert all(name in readme for name in ("`config/schema.py` before", "`checkpoint/storage/` before"))
    listed = set(re.findall(r"^(\w+)/ ", tree, re.M))
    assert all((ROOT / folder).is_dir() for folder in listed)
    if (ROOT / ".git").exists():
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
        folders = {path.split("/")[0] for path in tracked.splitlines() if "/" in path and path[0] != "."}
        assert not folders or listed == folders - {"megatron_qwenvl"}
