"""The direction of imports between the rooms of the package, and that only two of them know devices and backends."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "megatron_qwenvl"
ROOMS = [  # a room imports from those above it
    "runtime",
    "config.schema",
    "architecture",  # the description of the model, which validation reads
    "config",
    "batch",
    "checkpoint.storage",
    "engine",
    "data.errors",
    "data.images",
    "data.lru_cache",
    "data.records",
    "data.rendering",
    "data.shards",
    "data.sampling",
    "data.loading",
    "model",
    "checkpoint.formats",
    "checkpoint.convert",
    "checkpoint.run",
    "training",
    "inference",
    "evaluation",
    "preflight",
    "profiling",
    "demo",
    "commands",
    "train",
]
APART = [  # and never, in either direction, across these
    ("data", "model"),
    ("checkpoint.convert", "checkpoint.run"),
    ("checkpoint", "data"),
    ("training", "inference"),
    ("training", "evaluation"),
]
DEVICE_ROOMS = ("config", "runtime", "engine", "preflight")
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


def room_of(module: str) -> str | None:
    """The room of a module, both dotted and without the package's name; None outside of all rooms."""
    return next((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), None)


def must_not_meet(importer: str, imported: str) -> bool:
    """Whether two rooms must not know each other."""
    return any(
        (importer.startswith(a) and imported.startswith(b))
        or (importer.startswith(b) and imported.startswith(a))
        for a, b in APART
    )


def import_violations(path: Path, root: Path) -> Iterator[str]:
    """Imports of `path` that run down or sideways."""
    relative = path.relative_to(root)
    importer = room_of(".".join(relative.with_suffix("").parts))
    if importer is None:
        return
    package = ".".join([PACKAGE, *relative.parts[:-1]])
    for line, module in imported_modules(ast.parse(path.read_text()), package):
        name, _, inside = module.partition(".")
        imported = room_of(inside) if name == PACKAGE else None
        if imported in (None, importer):
            continue
        if ROOMS.index(imported) > ROOMS.index(importer) or must_not_meet(importer, imported):
            yield f"{relative}:{line}: {importer} imports {inside}"


def device_violations(path: Path, root: Path) -> Iterator[str]:
    """Uses of `torch.cuda`, `.cuda()` and questions about device or backend."""
    relative = path.relative_to(root)
    if relative.parts[0] in DEVICE_ROOMS:
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


def plant(root: Path, file: str, source: str) -> None:
    """Write a module below `root`."""
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


def test_the_package_keeps_the_rules() -> None:
    root = Path(__file__).parents[2] / PACKAGE
    modules = (".".join(path.relative_to(root).with_suffix("").parts) for path in root.rglob("*.py"))
    unplaced = [module for module in modules if room_of(module) is None and not module.endswith("__init__")]
    assert not unplaced, f"modules without a room in the order: {unplaced}"
    assert violations(root) == []


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        (
            "data/loading/loader.py",
            "from megatron_qwenvl.model import specs",
            "data.loading imports model.specs",
        ),
        (
            "data/loading/loader.py",
            "def f():\n    from ...model.specs import Norm",
            "data.loading imports model.specs.Norm",
        ),
        (
            "model/stage.py",
            "from megatron_qwenvl.data.loading import loader",
            "model imports data.loading.loader",
        ),
        ("config/load.py", "import megatron_qwenvl.engine.start", "config imports engine.start"),
        ("engine/start.py", "from .. import training", "engine imports training"),
        (
            "inference/chat.py",
            "from megatron_qwenvl.training.loop import run",
            "inference imports training.loop.run",
        ),
        ("evaluation/run.py", "from megatron_qwenvl import train", "evaluation imports train"),
        (
            "model/stage.py",
            "import torch\ntorch.cuda.synchronize()",
            "stage.py:2: torch.cuda belongs into runtime",
        ),
        ("training/loop.py", "x = tensor.cuda()", "tensor.cuda belongs into runtime"),
        ("data/loading/loader.py", "from torch.cuda import Stream", "torch.cuda.Stream belongs into runtime"),
        ("training/loop.py", "if device.type == 'cuda': pass", "belongs into runtime"),
        (
            "checkpoint/save.py",
            "fast = dist.get_backend() == 'nccl'",
            "dist.get_backend belongs into runtime",
        ),
    ],
)
def test_a_planted_violation_is_named(tmp_path: Path, file: str, source: str, found: str) -> None:
    plant(tmp_path, file, source)
    assert found in "\n".join(violations(tmp_path))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/stage.py", "from megatron_qwenvl.batch import Batch"),
        ("model/stage.py", "from .specs import Norm\nfrom megatron_qwenvl.config.schema import RunConfig"),
        ("training/loop.py", "from megatron_qwenvl.data.loading.loader import Loader"),
        ("engine/start.py", "import torch\ntorch.cuda.synchronize()"),
        ("train.py", "from .evaluation import runner\nfrom .training.loop import run"),
    ],
)
def test_what_is_allowed_is_not_named(tmp_path: Path, file: str, source: str) -> None:
    plant(tmp_path, file, source)
    assert violations(tmp_path) == []


CONVERSIONS = ("imports", "exports", "next_stage", "inspect", "compare")


def test_no_conversion_imports_another() -> None:
    """They share what is below them in `checkpoint/convert`; each has one reason to change."""
    room = Path(__file__).parents[2] / PACKAGE / "checkpoint/convert"
    package = f"{PACKAGE}.checkpoint.convert"
    files = [path for path in room.glob("*.py") if path.stem != "__init__"]
    assert {path.stem for path in files} >= set(CONVERSIONS)
    found = {
        (path.stem, name)
        for path in files
        for _, module in imported_modules(ast.parse(path.read_text()), package)
        for name in CONVERSIONS
        if f"{module}.".startswith(f"{package}.{name}.")
    }
    assert not found, f"imports of conversions: {sorted(found)}"
