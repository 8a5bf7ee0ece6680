"""Read the log of a Slurm job: what ended it, as ranks and srun report it (used by restart_policy.py).

Python 3.6 or newer, standard library only.
"""

import re
from pathlib import Path
from typing import Iterator, List, Optional, Sequence

# As in megatron_qwenvl/runtime/exit_codes.py; a test compares them.
RUN_ERROR = 1
USAGE_ERROR = 2
BAD_NODES = 3
CRASHED = 70
HUNG = 71
INTERRUPTED = 75
# As a shell reports the end of a process by SIGUSR1 and SIGTERM.
BY_SIGUSR1 = 138
BY_SIGTERM = 143
FIRST_SIGNAL = 128

CAUSE_BYTES = 2000
"""Length of a cause in the log and in failures.tsv."""
ATTEMPT = "=== attempt "
"""Beginning of the line in a job's log with which an attempt begins."""

LABEL = re.compile(r"^ *[0-9]+: ")  # of srun --label
TIME = re.compile(r"^[0-9-]+ [0-9:,]+ ")
LOST_PEER = "FAILED (lost peer)"
OUT_OF_MEMORY = re.compile(r"oom.kill")
NODE_FAILURE = re.compile(r"^srun: error: .*Node failure")
TASK_ENDED = re.compile(r"^srun: error: .*tasks? [-0-9,\[\]]+: ")
EXIT_CODE = re.compile(r": Exited with exit code ([0-9]+)$")
ENDED_BY_STOP_SIGNAL = re.compile(r": (Terminated|User defined signal 1)")
SRUN_ERROR = re.compile(r"^srun: (error|fatal): ")
SRUN_NOT_STARTED = r"^srun: (error|fatal): (Unable|Failed|Could not|_establish).*(%s)"
SLURM_LINE = re.compile(r"^(srun|slurmstepd)")
STEP_LINE = re.compile(r"^(srun|slurmstepd): .*\*\*\* STEP")


def first_cause(lines: Sequence[str], exit_code: int) -> str:
    """Find the first line in which a rank reports its failure, or srun that of a rank that could not.

    A rank that only lost its connection to another one counts last.
    """
    lost_peer = exited = srun_error = ""
    for line in _unlabelled(lines):
        if LOST_PEER in line:
            lost_peer = lost_peer or line
        elif "FAILED" in line or OUT_OF_MEMORY.search(line) or NODE_FAILURE.search(line):
            return TIME.sub("", line)
        elif TASK_ENDED.search(line):
            code = _exit_code(line)
            if code in (RUN_ERROR, USAGE_ERROR, HUNG):  # the rank itself reports why, if it could
                exited = exited or line
            elif code not in (CRASHED, INTERRUPTED) and not ENDED_BY_STOP_SIGNAL.search(line):
                return line
        elif SRUN_ERROR.search(line):
            srun_error = srun_error or line
    return TIME.sub("", lost_peer or exited or srun_error or f"exit code {exit_code}")


def last_message(lines: Sequence[str], exit_code: int) -> str:
    """Find the last line of a program; without any, the last of Slurm, or the exit code."""
    program = slurm = ""
    for line in lines:
        if not line.strip() or line.startswith("===") or STEP_LINE.search(line):
            continue
        if SLURM_LINE.search(line):
            slurm = line
        else:
            program = line
    return program or slurm or f"exit code {exit_code}"


def _unlabelled(lines: Sequence[str]) -> Iterator[str]:
    return (LABEL.sub("", line) for line in lines)


def _exit_code(line: str) -> Optional[int]:
    """Exit code in srun's line about a task."""
    found = EXIT_CODE.search(line)
    return int(found.group(1)) if found else None


def was_not_started(lines: Sequence[str], unreachable: str) -> bool:
    """Whether srun could not start the processes because Slurm could not be reached.

    Args:
        lines: the log since the phase began.
        unreachable: regular expression of the messages of Slurm's clients; nothing matches none.
    """
    pattern = re.compile(SRUN_NOT_STARTED % unreachable)
    return bool(unreachable) and any(pattern.search(line) for line in lines)


def first_rank_was_interrupted(lines: Sequence[str]) -> Optional[bool]:
    """Whether the first rank that ended did so because of a stop signal; None where srun does not say.

    srun itself sends SIGTERM to all other ranks when one fails, so only the end of the first one tells.
    """
    failed = False
    for line in _unlabelled(lines):
        failed = failed or ("FAILED" in line and LOST_PEER not in line)
        if line.startswith("srun: forcing job termination"):
            return True
        if TASK_ENDED.search(line):
            code = _exit_code(line)
            if code == INTERRUPTED or ENDED_BY_STOP_SIGNAL.search(line):
                return True
            if code != CRASHED or failed:  # else it lost a peer, whose end is reported next
                return False
    return None


def one_line(text: str) -> str:
    """Shorten a text to one line of at most `CAUSE_BYTES` bytes."""
    return encode(re.sub("[\n\r\t]", " ", text))[:CAUSE_BYTES].decode("utf-8", "ignore")


def encode(text: str) -> bytes:
    """Encode a text for a file or a pipe, whatever the locale; bytes that are not UTF-8 come out as they were read."""
    return text.encode("utf-8", "surrogateescape")


def read_lines(path: Path, start: int = 0) -> List[str]:
    """Read the lines of a file from a byte on; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read().decode("utf-8", "surrogateescape").split("\n")
    except OSError:
        return []


def first_line(path: Path) -> str:
    """Read the first line of a file; nothing where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.readline().replace(b"\0", b"").decode("utf-8", "surrogateescape").strip()
    except OSError:
        return ""


def read_phase_log(path: Path, start: int) -> List[str]:
    """Read what a job's log says since a byte, and since its newest attempt began."""
    lines = read_lines(path, start)
    begins = [number for number, line in enumerate(lines) if line.startswith(ATTEMPT)]
    return lines[begins[-1] + 1 :] if begins else lines
