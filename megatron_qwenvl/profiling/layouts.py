"""Short runs of one recipe in several parallel layouts, each through a launcher and in its own folder.

Needs neither torch nor megatron-core: it starts the training program and reads its metrics and log.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_qwenvl.config.load import ConfigError, load_config
from megatron_qwenvl.runtime.exit_codes import INTERRUPTED
from megatron_qwenvl.runtime.torchrun import local_command

from .throughput import IncompleteRun, Row, measure_throughput, read_metrics

ProgressCallback = Callable[[str], None]


class ProfileError(Exception):
    """Invalid measurement; the message names every problem."""


@dataclass(frozen=True)
class Launcher:
    """Launcher of a run: one of the scripts in `launch/`, or torchrun."""

    script: Path | None
    """The script; None: torchrun with processes on this machine."""
    processes: int
    """Processes that it starts."""

    @classmethod
    def find(cls, script: Path | None, processes: int | None, environment: Mapping[str, str]) -> Launcher:
        """Find a launcher; the default of `processes` is NPROC, or the tasks of the Slurm allocation.

        Raises:
            ProfileError: no such script, or the number of processes is not known.
        """
        if script is not None and not (os.access(script, os.X_OK) and script.is_file()):
            raise ProfileError(f"--launcher: expected a script such as launch/local.sh, found {script}")
        text = (
            str(processes)
            if processes is not None
            else environment.get("NPROC") or _default_processes(script, environment)
        )
        if not text.isdecimal() or int(text) < 1:
            raise ProfileError(f"--processes: expected a number, there or in NPROC, found {text!r}")
        return cls(script.resolve() if script else None, int(text))

    @property
    def name(self) -> str:
        """Name of the launcher in the table."""
        return self.script.name if self.script else "torchrun"

    def command(self, *arguments: str) -> list[str]:
        """Command that starts the training program with these arguments."""
        if self.script is None:
            return local_command(self.processes, "-m", "megatron_qwenvl.train", *arguments)
        return [str(self.script), *arguments]

    def environment(self) -> dict[str, str]:
        """Environment that makes the command start the training program in that many processes."""
        inherited = {name: value for name, value in os.environ.items() if name != "PROGRAM"}
        return {"OMP_NUM_THREADS": "1", **inherited, "NPROC": str(self.processes)}


def _default_processes(script: Path | None, environment: Mapping[str, str]) -> str:
    """Number of processes that a launcher starts without NPROC; empty if only the launcher knows."""
    if script is None or script.name == "local.sh":
        return "1"
    if "SLURM_JOB_ID" in environment:
        return environment.get("SLURM_NTASKS", "")
    return "" if "HOSTS" in environment or script.name == "srun.sh" else "1"


@dataclass(frozen=True)
class Measurement:
    """Common settings of the runs of all layouts."""

    recipe: str
    """Name of a recipe, or a YAML file."""
    launcher: Launcher
    """Launcher of the runs."""
    out: Path
    """Directory of the table and of each layout's folder."""
    overrides: tuple[str, ...] = ()
    """`--section.field value` of all layouts."""
    steps: int = 10
    """Measured steps."""
    warmup: int = 3
    """Steps before the measured ones."""


@dataclass(frozen=True)
class Layout:
    """One parallel layout of the recipe, with any other fields that it changes."""

    text: str
    """The argument: `field=value` of `parallel`, or `section.field=value` of any section, separated by spaces."""
    overrides: tuple[str, ...]
    """The layout as overrides of the configuration."""

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read a layout such as `tensor=2 pipeline=4 train.recompute=full`; empty: the recipe as it is.

        Raises:
            ProfileError: a malformed word.
        """
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise ProfileError(f"--layout {text!r}: {error}") from None
        for word in words:
            if not re.match(r"[a-z][\w.]*=", word):
                raise ProfileError(
                    f"--layout {text!r}: expected field=value or section.field=value, found {word!r}"
                )
        named = (word if "." in word.partition("=")[0] else f"parallel.{word}" for word in words)
        return cls(text.strip() or "as in the recipe", tuple(f"--{word}" for word in named))


def run_overrides(measurement: Measurement, layout: Layout, folder: Path) -> list[str]:
    """All overrides of a layout's run: fresh weights by default, no checkpoints, every step logged."""
    return [
        "--checkpoint.init_from=null",
        *measurement.overrides,
        *layout.overrides,
        *(f"--{field}={value}" for field, value in _fixed(measurement, folder).items()),
    ]


def _fixed(measurement: Measurement, folder: Path) -> dict[str, str]:
    return {
        "run_dir": json.dumps(str(folder)),  # quoted: a value is YAML
        "train.stop_after": str(measurement.warmup + measurement.steps),
        "train.validation_interval": "0",
        "checkpoint.save": "false",
        "logging.interval": "1",
        "logging.tensorboard": "false",
    }


def layout_folder(measurement: Measurement, layouts: Sequence[Layout], number: int) -> Path:
    """Folder of a layout: its number, and its text with other characters replaced by `_`."""
    name = re.sub(r"[^\w.=,-]+", "_", layouts[number].text).strip("_")[:80]
    return measurement.out / f"{number + 1:02d}_{name}"


def validate_layouts(measurement: Measurement, layouts: Sequence[Layout]) -> None:
    """Validate every layout's configuration before the first run.

    Raises:
        ProfileError: names all problems of all layouts.
    """
    layouts_of: dict[str, list[str]] = {}
    fixed = _fixed(measurement, measurement.out)
    for number, layout in enumerate(layouts):
        given = [*measurement.overrides, *layout.overrides]
        names = {argument[2:].partition("=")[0] for argument in given if argument.startswith("--")}
        problems = [f"{name}: set by the measurement itself" for name in sorted(names & fixed.keys())]
        overrides = run_overrides(measurement, layout, layout_folder(measurement, layouts, number))
        try:
            load_config(measurement.recipe, overrides, measurement.launcher.processes)
        except ConfigError as error:
            problems.append(str(error))
        for problem in problems:
            layouts_of.setdefault(problem, []).append(layout.text)
    if layouts_of:
        raise ProfileError(
            "\n".join(f"layout {'; '.join(where)}: {problem}" for problem, where in layouts_of.items())
        )


def run_layout(
    measurement: Measurement, layouts: Sequence[Layout], number: int, report: ProgressCallback
) -> Row:
    """Run one layout and report its steps; a failure becomes a row with its reason."""
    layout, folder = layouts[number], layout_folder(measurement, layouts, number)
    folder.mkdir(parents=True, exist_ok=True)
    metrics, log = folder / "metrics.jsonl", folder / "log.txt"
    metrics.unlink(missing_ok=True)
    overrides = run_overrides(measurement, layout, folder)
    command = measurement.launcher.command("--recipe", measurement.recipe, *overrides)
    code = _run(command, measurement.launcher.environment(), log, metrics, report)
    if code:
        text = log.read_text(encoding="utf-8", errors="replace")
        return Row(layout.text, str(folder), None, failure_reason(text, code))
    try:
        start, steps = read_metrics(metrics)
        result = measure_throughput(start, steps, measurement.warmup, measurement.steps)
    except IncompleteRun as error:
        return Row(layout.text, str(folder), None, str(error))
    return Row(layout.text, str(folder), result)


def _run(
    command: Sequence[str], environment: Mapping[str, str], log: Path, metrics: Path, report: ProgressCallback
) -> int:
    """Run a command to its end with all output in `log`; returns the exit code."""
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        reported = 0
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1.0)
                done = _steps_done(metrics)
                if done > reported:
                    report(f"  {done} steps done")
                    reported = done
        except BaseException:
            process.terminate()  # launchers end their processes; leaving the block waits for them
            raise
    return process.returncode


def _steps_done(metrics: Path) -> int:
    return metrics.read_bytes().count(b'{"kind": "train"') if metrics.exists() else 0


# `DataError: ...` or `torch.OutOfMemoryError: ...`, with any prefix of the log, and the program's own refusals.
_ERROR = re.compile(
    r"(?:^|\s)((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt)(?:: .+|$))|^(?:train|python -m [\w.]+): (.+)"
)
_KILLED = re.compile(r"((?:Signal \d+ \(SIG\w+\)|error: ).*)")
# Messages of the other ranks and of the launcher after a rank has ended.
_CONSEQUENCE = re.compile(
    r"lost peer|ChildFailedError|DistNetworkError|DistBackendError|Connection (closed|reset|refused)|NCCL|gloo"
)
LONGEST_REASON = 300


def failure_reason(log: str, code: int) -> str:
    """Find the reason of a failure: out of memory, otherwise the last error that is not a consequence of another.

    Args:
        log: output of the run.
        code: exit code of the run.
    """
    if code == INTERRUPTED:
        return "interrupted by a signal"
    joined = re.sub(r"(problems?)\n\s+", r"\1: ", log)  # the problems of a configuration, one a line
    lines = [line.strip() for line in joined.splitlines() if line.strip()]
    own = [line for line in lines if not _CONSEQUENCE.search(line)]
    causes = _matches(_ERROR, own)
    memory = [cause for cause in causes if "out of memory" in cause.lower()]
    for found in (memory, causes, _matches(_KILLED, own), _matches(_ERROR, lines), lines):
        if found:
            return found[-1][:LONGEST_REASON]
    return f"exit code {code} without a word"


def _matches(pattern: re.Pattern[str], lines: Sequence[str]) -> list[str]:
    """Find the pattern in the lines; returns the group that matched in each."""
    return [next(filter(None, match.groups())) for line in lines if (match := pattern.search(line))]
