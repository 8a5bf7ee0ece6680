"""The versions of megatron-core that this package is tested with; each Python has one.

megatron-core 0.17 and later need Python 3.12. The rest of this room works with every version named here; what one of
them does differently is listed in `docs/engine.md`, and the contract tests in `tests/unit/engine` run under each.
"""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version

logger = logging.getLogger(__name__)

TESTED_BELOW_3_12 = "0.16.1"
TESTED_FROM_3_12 = "0.19.2"


class EngineVersionError(RuntimeError):
    """The installed megatron-core is not the one that the CPU adapter was read against."""


def tested_version(python: tuple[int, int] = sys.version_info[:2]) -> str:
    """Version of megatron-core that is tested with a Python, by default with the running one."""
    return TESTED_BELOW_3_12 if python < (3, 12) else TESTED_FROM_3_12


def installed_version() -> str:
    """Version of the installed megatron-core, from its metadata.

    `megatron.core.__version__` of 0.19 also names the Git commit of whatever repository the process is started in.
    """
    return version("megatron-core")


def engine_is_at_least(major: int, minor: int) -> bool:
    """Return whether the installed megatron-core is of this release or a later one; `docs/engine.md` lists the uses."""
    installed = installed_version().split(".")
    return (int(installed[0]), int(installed[1])) >= (major, minor)


def check_version(on_gpu: bool, log: bool = True) -> None:
    """Compare the installed megatron-core with the tested one.

    On CPU another version is refused, because the adapter replaces names inside megatron-core. On GPUs nothing is
    replaced that a contract test would not notice, so another version gets a warning only.

    Args:
        on_gpu: whether the run computes on GPUs.
        log: whether this process logs the warning.

    Raises:
        EngineVersionError: on CPU, naming both versions.
    """
    installed, tested = installed_version(), tested_version()
    if installed == tested:
        return
    python = ".".join(map(str, sys.version_info[:2]))
    found = f"megatron-core {tested} is tested with Python {python}, found {installed}"
    if not on_gpu:
        raise EngineVersionError(f"{found}: install megatron-core=={tested} or run on a GPU")
    if log:
        logger.warning("%s: run the tests of tests/unit/engine with it before a long run", found)
