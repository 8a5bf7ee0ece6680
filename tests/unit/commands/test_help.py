"""`--help` of every program answers before anything heavy is imported, and so do wrong arguments."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
OURS = {name: target.partition(":")[0] for name, target in SCRIPTS.items()}
HEAVY = ["torch", "megatron", "numpy", "PIL", "tiktoken", "webdataset", "mpi4py"]
LISTED = f"import sys; print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"


def call(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program's `main`; the last line of standard error lists what it has imported of `HEAVY`."""
    script = f"""
import importlib
try:
    importlib.import_module({module!r}).main({list(arguments)!r})
except SystemExit as end:
    assert end.code in (0, 2), end.code
{LISTED}
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", OURS)
def test_help_imports_nothing_heavy(name: str) -> None:
    done = call(OURS[name], "--help")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert len(done.stdout) > 200


def test_help_of_preflight_keeps_its_lines() -> None:
    shown = call(OURS["qwenvl-preflight"], "--directory", ".", "--help").stdout
    usage = shown.partition("\n\n")[0]
    for option in ("--directory", "--bad_nodes", "--deadline", "--slow_nodes"):
        assert f"[{option} " in usage and f"\n  {option} " in shown
    assert "\n\nCheck in under a minute that a run can start" in shown
    assert "\n\nExit codes: 0 passed; 1 " in shown


def test_every_tool_is_a_program_with_a_console_script() -> None:
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert tools == {module.rpartition(".")[2] for module in OURS.values()} - {"train", "torchrun"}
    for tool in tools:
        text = (ROOT / f"tools/{tool}.py").read_text()
        (name,) = (name for name, module in OURS.items() if module.endswith(f".{tool}"))
        assert f"from megatron_qwenvl.commands.{tool} import run" in text and f"`{name}`" in text
