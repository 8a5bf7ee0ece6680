"""Break the source in one place after the other and see whether its tests notice.

    python -m tests.mutants.check              # or make mutants
    python -m tests.mutants.check clipping     # the mutants with this word in their name (MUTANTS=clipping)

Works on a copy of the tracked files. Every mutant runs in a fork of this process, which has imported the libraries but
nothing of the project, so that a mutant costs seconds. Ends with 1 if a mutant is alive, and with 2 if a mutant cannot
be judged: its text is not found, its module does not import, its tests fail without it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from .mutant import Mutant
from .table import MUTANTS

ROOT = Path(__file__).parents[2]
PROJECT = ("megatron_qwenvl", "tests", "job_failures", "job_log", "job_states", "restart_policy")
TIME_LIMIT = 300
VERDICTS = {pytest.ExitCode.OK: "ALIVE", pytest.ExitCode.TESTS_FAILED: "killed"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only mutants with one of these in their name")
    words = parser.parse_args().words
    mutants = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    import_libraries()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "copy"
        copy_tree(copy)
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        if (verdict := run(copy, tests))[0] != "ALIVE":
            print(f"the tests do not pass without a mutant:\n{verdict[1]}")
            return 2
        return report([(mutant, *judge(copy, mutant)) for mutant in mutants])


def judge(copy: Path, mutant: Mutant) -> tuple[str, str]:
    """Verdict on a mutant and the last lines of its tests' output; the copy is as before afterwards."""
    source = copy / mutant.file
    original = source.read_text(encoding="utf-8")
    if (count := original.count(mutant.old)) != 1:
        return "NOT FOUND", f"{mutant.file}: expected once, found {count} times: {mutant.old}"
    source.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    began = time.monotonic()
    try:
        verdict, output = run(copy, mutant.tests)
    finally:
        source.write_text(original, encoding="utf-8")
    print(f"{verdict:9s} {time.monotonic() - began:4.0f} s  {mutant.name}{because(output)}", flush=True)
    return verdict, output


def because(output: str) -> str:
    """The first line of an error in pytest's output."""
    errors = [line for line in output.splitlines() if line.startswith("E  ")]
    return f"  <- {errors[0][1:].strip()[:110]}" if errors else ""


def report(results: Sequence[tuple[Mutant, str, str]]) -> int:
    """Print what is not as it should be, and the counts; returns the exit status."""
    for mutant, verdict, output in results:
        if verdict != "killed":
            print(f"\n{verdict}: {mutant.name} ({mutant.file})\n{output}")
    verdicts = [verdict for _, verdict, _ in results]
    print(", ".join(f"{verdicts.count(v)} {v}" for v in sorted(set(verdicts))))
    return max(({"killed": 0, "ALIVE": 1}.get(verdict, 2) for verdict in verdicts), default=0)


def import_libraries() -> None:
    """Import what the tests import, apart from the project itself, whose source every mutant imports anew.

    Which modules these are is found out in another fork.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        import tests.distributed.harness  # noqa: F401

        names = [n for n in sys.modules if n.partition(".")[0] not in (*PROJECT, "__main__")]
        os.write(writer, "\n".join(n for n in names if n.startswith(("megatron.", "torch."))).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read().split()
    os.waitpid(child, 0)
    for name in found:
        __import__(name)


def copy_tree(copy: Path) -> None:
    """Copy the tracked files, and those that git does not ignore, as they lie in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)


def run(copy: Path, tests: Sequence[str]) -> tuple[str, str]:
    """Verdict of tests on the copy as it is, and the last lines of their output."""
    log = copy.parent / "log"
    child = os.fork()
    if not child:
        os._exit(run_here(copy, tests, log))
    code = None
    try:
        code = wait(child)
    finally:
        if code is None:  # no end in time, or this program is interrupted
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    output = "\n".join(log.read_text(errors="replace").splitlines()[-60:])
    if code is None:
        return "killed", f"{output}\nE  no end within {TIME_LIMIT} s"
    return VERDICTS.get(code, f"ERROR {code}"), output  # type: ignore[call-overload]


def wait(child: int) -> int | None:
    """Exit status of a process; None if it runs longer than the limit."""
    with contextlib.suppress(PermissionError):  # it has done so itself
        os.setpgid(child, child)
    deadline = time.monotonic() + TIME_LIMIT
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    return None


def run_here(copy: Path, tests: Sequence[str], log: Path) -> int:
    """Run tests of the copy in this process; returns pytest's exit status."""
    os.setpgid(0, 0)  # the tests' own processes end with it
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    # A cached byte code counts as current when size and second are the same, as those of two mutants may be.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path = [str(copy), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    for name in [n for n in sys.modules if n.partition(".")[0] in PROJECT]:
        del sys.modules[name]
    import megatron_qwenvl

    assert Path(megatron_qwenvl.__file__).is_relative_to(copy), megatron_qwenvl.__file__
    arguments = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", "--durations=0", "--tb=short", *tests]
    code = int(pytest.main(arguments))
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
