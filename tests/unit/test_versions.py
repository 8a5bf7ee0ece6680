"""Versions are the same in pyproject.toml, requirements/, the Dockerfile, the engine's guard and docs/versions.md."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from check_engine import TRANSFORMER_ENGINE, find_mismatch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_qwenvl.engine import versions

from .test_architecture import imported_modules

ROOT = Path(__file__).parents[2]
PYTHONS = [(3, 11), (3, 12)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def chosen(lines: list[str], python: tuple[int, int]) -> dict[str, Requirement]:
    """Requirements by name that apply to a Python."""
    environment = {"python_version": "{}.{}".format(*python)}
    requirements = [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]
    return {
        canonicalize_name(requirement.name): requirement
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }


def pins(name: str, python: tuple[int, int] = (3, 12)) -> dict[str, str]:
    """Pinned versions by name of a file in requirements/."""
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return {name: str(pin.specifier).removeprefix("==") for name, pin in chosen(lines, python).items()}


def table_rows() -> Iterator[tuple[str, list[str]]]:
    """Rows of the first table of docs/versions.md: head and cells of the two Pythons."""
    for line in (ROOT / "docs/versions.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3:
            yield cells[0], cells[1:]


def test_the_readme_shows_the_same_table() -> None:
    rows = [
        line
        for line in (ROOT / "docs/versions.md").read_text(encoding="utf-8").splitlines()
        if line[:1] == "|"
    ]
    table = "\n".join(rows[:7])
    assert table.count("0.19.2") and table in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("python", PYTHONS)
def test_each_dependency_is_pinned_within_its_range(python: tuple[int, int]) -> None:
    extras = PROJECT["optional-dependencies"]
    declared = [
        *PROJECT["dependencies"],
        *(line for name in extras if name != "gpu" for line in extras[name]),
    ]
    pinned = pins("cpu.txt", python)
    for name, requirement in chosen(declared, python).items():
        if name == PROJECT["name"]:  # an extra that consists of others
            continue
        assert name in pinned, f"requirements/cpu.txt does not pin {name} for Python {python}"
        assert requirement.specifier.contains(pinned[name]), f"{requirement}: pinned at {pinned[name]}"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_engine_of_each_python_is_the_tested_one(python: tuple[int, int]) -> None:
    declared = chosen(PROJECT["dependencies"], python)["megatron-core"]
    assert str(declared.specifier) == f"=={versions.tested_version(python)}"
    assert pins("cpu.txt", python)["megatron-core"] == versions.tested_version(python)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_pinned_transformer_engine_goes_with_the_engine(python: tuple[int, int]) -> None:
    pinned = pins("te-contract.txt", python)["transformer-engine"]
    extra = chosen(PROJECT["optional-dependencies"]["gpu"], python)["transformer-engine"]
    assert str(extra.specifier) == f"=={pinned}"
    assert find_mismatch(versions.tested_version(python), pinned) is None


def test_a_transformer_engine_outside_of_the_range_is_named() -> None:
    assert find_mismatch("0.16.1", "2.11.0+abc") is None
    assert "found 2.12" in str(find_mismatch("0.16.1", "2.12"))
    assert "expected Transformer Engine 2.10 or newer" in str(find_mismatch("0.19.2", "2.9.0"))
    assert "expected megatron-core 0.16.1 or 0.19.2, found 0.17.0" in str(find_mismatch("0.17.0", "2.14"))


def test_the_container_holds_the_tested_versions() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert f"ARG MEGATRON_CORE={versions.tested_version((3, 12))}\n" in dockerfile
    pinned = pins("cpu.txt")
    assert {name: pinned[name] for name in pins("container.txt")} == pins("container.txt")
    image = re.search(r"ARG NGC_TAG=(\S+)-py3", dockerfile)
    assert image is not None
    assert dict(table_rows())["NGC image"][1].startswith(f"{image[1]}:")


def test_the_container_holds_every_package_that_is_imported() -> None:
    image = {"torch", "triton", "transformer_engine", "numpy", "tensorboard", "megatron", "packaging"}
    dists = {"PIL": "pillow", "yaml": "PyYAML"}
    imported = {
        name.partition(".")[0]
        for path in (ROOT / "megatron_qwenvl").rglob("*.py")
        for _, name in imported_modules(ast.parse(path.read_text()), "megatron_qwenvl")
    }
    others = imported - sys.stdlib_module_names - image - {"megatron_qwenvl"}
    assert {canonicalize_name(dists.get(name, name)) for name in others} <= pins("container.txt").keys()


@pytest.mark.parametrize(("column", "python"), list(enumerate(PYTHONS)))
def test_the_table_of_the_docs_says_the_same(column: int, python: tuple[int, int]) -> None:
    table = {head: cells[column] for head, cells in table_rows()}
    engine = versions.tested_version(python)
    first, beyond = TRANSFORMER_ENGINE[engine]
    assert table["megatron-core"].startswith(f"{engine}: tested")
    assert table["torch"].startswith(f"{pins('cpu.txt', python)['torch']}: tested")
    assert table["Transformer Engine"].startswith(f"{first[0]}.{first[1]} to {beyond[0]}.{beyond[1] - 1}:")
    extra = pins("te-contract.txt", python)["transformer-engine"]
    assert table["its release in the extra `gpu`"].startswith(f"{extra}:")
