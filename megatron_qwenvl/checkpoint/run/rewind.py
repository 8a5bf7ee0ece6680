"""Going back to an older checkpoint without losing the newer ones.

They are moved to `RUN/checkpoints/rewound_NNN/`, where the run's own search does not look; each is still a checkpoint
that can be given by its path. `rewind.json` beside them records who went back where. A job that Slurm starts again
repeats its arguments; by that file it knows that it has gone back already.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.json_text import parse_json
from megatron_qwenvl.checkpoint.storage.run_folder import checkpoints_of_run, step_of, step_of_resumable
from megatron_qwenvl.checkpoint.storage.writing import replace_bytes
from megatron_qwenvl.runtime.listing import matching_entries
from megatron_qwenvl.runtime.retry import retry_read
from megatron_qwenvl.runtime.slurm import own_job

RECORD = "rewind.json"


@dataclass(frozen=True)
class Rewind:
    """A run that went back.

    Attributes:
        to_step: step of the checkpoint that it goes on from.
        from_step: step of its newest checkpoint before.
        folder: where the newer checkpoints are.
        moved: how many.
    """

    to_step: int
    from_step: int
    folder: str
    moved: int


def of_step(checkpoints: Sequence[Path], step: int) -> Path:
    """Find the checkpoint of a step.

    Raises:
        CheckpointError: there is none; the message names the steps that have one.
    """
    steps = {step_of_resumable(path): path for path in checkpoints}
    if step not in steps:
        there = ", ".join(map(str, sorted(steps))) or "no checkpoint"
        raise CheckpointError(
            f"--from_step {step}: expected the step of a checkpoint of the run, found {there}"
        )
    return steps[step]


def is_rewound(directory: Path, step: int) -> bool:
    """Whether the Slurm job of this process was started again after it had gone back to the step.

    Raises:
        CheckpointError: unknown, because a record cannot be read.
    """
    job = own_job()
    if job is None or not job.restarts:
        return False
    found = retry_read(directory, lambda: matching_entries(directory, "rewound_*"))
    records = (_read(folder / RECORD) for folder in found)
    return any(
        record is not None and record.get("job") == job.id and record.get("to_step") == step
        for record in records
    )


def move_newer_checkpoints(directory: Path, step: int) -> Rewind:
    """Move the checkpoints of a run's folder that are newer than a step, the newest first, and record that.

    Raises:
        OSError: the file system refuses.
    """
    newer = [path for path in checkpoints_of_run(directory) if step_of(path) > step]
    folder = _new_folder(directory)
    for path in newer:
        path.rename(folder / path.name)
    rewind = Rewind(step, step_of(newer[0]) if newer else step, str(folder), len(newer))
    job = own_job()
    record = {**asdict(rewind), "job": job.id if job else None, "time": time.time()}
    replace_bytes(folder / RECORD, (json.dumps(record) + "\n").encode())  # last: only now it is done
    return rewind


def _new_folder(directory: Path) -> Path:
    number = 1
    while (folder := directory / f"rewound_{number:03d}").exists():
        number += 1
    folder.mkdir()
    return folder


def _read(path: Path) -> dict[str, object] | None:
    try:
        record = parse_json(retry_read(path, path.read_bytes))
    except FileNotFoundError:
        return None
    except OSError as error:  # to go back once more would undo the steps since
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
