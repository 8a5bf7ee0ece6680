"""Files that a start writes to its run directory besides checkpoints and metrics: configuration and `environment/`."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import yaml

from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.writing import replace_bytes
from megatron_qwenvl.config.fields import plain
from megatron_qwenvl.config.load import dump_yaml
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.runtime.environment import describe_environment
from megatron_qwenvl.runtime.listing import matching_entries
from megatron_qwenvl.runtime.processes import ProcessInfo
from megatron_qwenvl.runtime.retry import retry_read

logger = logging.getLogger(__name__)


CONFIG = "config.yaml"
CONFIG_FOR_TOOLS = "config.json"
"""The configuration as JSON, for tools without a YAML parser."""


def check_run_directory(folder: Path) -> None:
    """Check that a run can write to its directory, which may not exist yet; changes nothing.

    Raises:
        CheckpointError: the path, or a part of it, is not a directory or not writable.
        OSError: a file-system error.
    """
    place = folder.absolute()
    while not _exists(place):
        place = place.parent
    if not place.is_dir():
        raise CheckpointError(f"run_dir {folder}: expected a directory, but {place} is not one")
    if not os.access(place, os.W_OK | os.X_OK):
        raise CheckpointError(f"run_dir {folder}: {place} cannot be written to")
    for path in (folder / CONFIG, folder / CONFIG_FOR_TOOLS):
        if path.is_dir():
            raise CheckpointError(
                f"{path}: expected the file that holds the configuration, found a directory"
            )


def _exists(path: Path) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def record_start(config: RunConfig, process: ProcessInfo) -> None:
    """Write the resolved configuration and the environment of this start, and log changes since the previous start.

    May be repeated.

    Raises:
        OSError: a file-system error.
    """
    folder = Path(config.run_dir)
    environment = folder / "environment"
    environment.mkdir(parents=True, exist_ok=True)
    _log_changes(folder, config)
    replace_bytes(folder / CONFIG, dump_yaml(config).encode())
    replace_bytes(folder / CONFIG_FOR_TOOLS, json.dumps(plain(config), indent=1).encode())
    described = json.dumps(describe_environment(process).to_json(), indent=1) + "\n"
    replace_bytes(environment / f"{time.strftime('%Y%m%dT%H%M%S')}.json", described.encode())  # one per start


def _log_changes(folder: Path, config: RunConfig) -> None:
    """Log the fields that differ from the previous start, except those of parallel layout, runtime and logging."""
    before = _previous_configuration(folder)
    if before is None:
        return
    now = yaml.safe_load(dump_yaml(config))
    ignored = {"parallel", "runtime", "logging"}
    for section in sorted((before.keys() | now.keys()) - ignored, key=str):
        old, new = before.get(section), now.get(section)
        if not isinstance(old, dict) or not isinstance(new, dict):
            old, new = {"": old}, {"": new}
        for name in sorted(old.keys() | new.keys(), key=str):
            if old.get(name) != new.get(name):
                field = f"{section}.{name}".rstrip(".")
                logger.warning(
                    "%s was %s when this run was started before, now %s", field, old.get(name), new.get(name)
                )


def _previous_configuration(folder: Path) -> dict[Any, Any] | None:
    """Read the configuration of the previous start; None if there was none, or if its file is lost, which is logged."""
    path = folder / CONFIG
    try:
        found = yaml.safe_load(retry_read(path, lambda: path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        if retry_read(folder, lambda: matching_entries(folder / "checkpoints", "step_*")):
            logger.warning("%s is missing: changes since the last start are not known", path)
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        found = " ".join(str(error).split())
    if isinstance(found, dict):
        return found
    reason = "is empty" if found is None else f"is damaged ({str(found)[:100]})"
    logger.warning("%s %s: changes since the last start are not known; it is written anew", path, reason)
    return None
