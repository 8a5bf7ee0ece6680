"""The direction of imports, and that only `runtime/` knows devices and backends."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "megatron_qwenvl"
ORDER = {
    "config": 0,
    "runtime": 1,
    "data": 2,
    "model": 2,
    "checkpoint": 3,
    "planning": 3,
    "training": 4,
    "inference": 4,
    "evaluation": 5,
    "train": 6,
}
MEETING_POINT = ("model", "data.batch")  # the one import between neighbours: the typed micro-batch
DEVICE_CALLS = {"get_backend", "is_nccl_available", "is_gloo_available", "is_mpi_available"}
DEVICE_NAMES = {"cuda", "nccl", "gloo"}


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import; `package` is what a relative import starts from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*start, node.module] if node.module else start)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def import_violations(path: Path, root: Path) -> Iterator[str]:
    """Imports of `path` that run down or sideways."""
    relative = path.relative_to(root)
    importer = relative.parts[0].removesuffix(".py")
    if importer not in ORDER:
        return
    package = ".".join([PACKAGE, *relative.parts[:-1]])
    for line, module in imported_modules(ast.parse(path.read_text()), package):
        name, _, inside = module.partition(".")
        imported = inside.split(".")[0]
        if name != PACKAGE or imported not in ORDER or imported == importer:
            continue
        meets = importer == MEETING_POINT[0] and f"{inside}.".startswith(f"{MEETING_POINT[1]}.")
        if ORDER[imported] >= ORDER[importer] and not meets:
            yield f"{relative}:{line}: {importer} ({ORDER[importer]}) imports {inside} ({ORDER[imported]})"


def device_violations(path: Path, root: Path) -> Iterator[str]:
    """Uses of `torch.cuda`, `.cuda()` and questions about device or backend."""
    relative = path.relative_to(root)
    if relative.parts[0] in ("runtime", "config"):
        return
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (node.attr == "cuda" or node.attr in DEVICE_CALLS):
            yield f"{relative}:{node.lineno}: {ast.unparse(node)} belongs into runtime"
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Constant) and side.value in DEVICE_NAMES for side in sides):
                yield f"{relative}:{node.lineno}: {ast.unparse(node)} belongs into runtime"
    for line, module in imported_modules(tree, PACKAGE):
        if module.startswith("torch.cuda"):
            yield f"{relative}:{line}: import of {module} belongs into runtime"


def violations(root: Path) -> list[str]:
    """Everything in the package below `root` that breaks the rules."""
    files = sorted(root.rglob("*.py"))
    assert files, f"no Python files below {root}"
    return [
        line
        for path in files
        for check in (import_violations, device_violations)
        for line in check(path, root)
    ]


def test_the_package_keeps_the_rules() -> None:
    root = Path(__file__).parents[2] / PACKAGE
    unplaced = {p.name for p in root.iterdir() if p.is_dir() and (p / "__init__.py").exists()} - ORDER.keys()
    assert not unplaced, f"folders without a place in the order: {unplaced}"
    assert violations(root) == []


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("data/loader.py", "from megatron_qwenvl.model import specs", "data (2) imports model.specs (2)"),
        (
            "data/loader.py",
            "def f():\n    from ..model.specs import Norm",
            "data (2) imports model.specs.Norm (2)",
        ),
        ("model/stage.py", "from megatron_qwenvl.data import loader", "model (2) imports data.loader (2)"),
        ("config/load.py", "import megatron_qwenvl.runtime.engine", "config (0) imports runtime.engine (1)"),
        ("runtime/engine.py", "from .. import training", "runtime (1) imports training (4)"),
        (
            "inference/chat.py",
            "from megatron_qwenvl.training.loop import run",
            "imports training.loop.run (4)",
        ),
        ("evaluation/run.py", "from megatron_qwenvl import train", "evaluation (5) imports train (6)"),
        (
            "model/stage.py",
            "import torch\ntorch.cuda.synchronize()",
            "stage.py:2: torch.cuda belongs into runtime",
        ),
        ("training/loop.py", "x = tensor.cuda()", "tensor.cuda belongs into runtime"),
        ("data/loader.py", "from torch.cuda import Stream", "torch.cuda.Stream belongs into runtime"),
        ("training/loop.py", "if device.type == 'cuda': pass", "belongs into runtime"),
        (
            "checkpoint/save.py",
            "fast = dist.get_backend() == 'nccl'",
            "dist.get_backend belongs into runtime",
        ),
    ],
)
def test_a_planted_violation_is_named(tmp_path: Path, file: str, source: str, found: str) -> None:
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(source)
    assert found in "\n".join(violations(tmp_path))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/stage.py", "from megatron_qwenvl.data.batch import Batch"),
        ("model/stage.py", "from .specs import Norm\nfrom megatron_qwenvl.config.schema import RunConfig"),
        ("training/loop.py", "from megatron_qwenvl.data.loader import Loader"),
        ("runtime/engine.py", "import torch\ntorch.cuda.synchronize()"),
        ("train.py", "from .evaluation import runner\nfrom .training.loop import run"),
    ],
)
def test_what_is_allowed_is_not_named(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    assert violations(tmp_path) == []
