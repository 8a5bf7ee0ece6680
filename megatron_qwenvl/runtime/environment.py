"""Description of the environment of a process: node, versions, GPUs, code revision and relevant variables.

It is saved with every run, and preflight compares it between ranks. Nothing here fails because a tool is missing: facts
that cannot be determined are None.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_qwenvl import __version__

from .processes import ProcessInfo

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "apex",
    "flash-attn",
    "triton",
    "numpy",
    "safetensors",
    "tiktoken",
    "tokenizers",
    "webdataset",
    "pillow",
    "pydantic",
    "mpi4py",
)
"""Packages whose version can change the results or the input of a run."""

VARIABLE_PREFIXES = (
    "CUDA_ CUBLAS_ FI_ GLOO_ KMP_ MASTER_ MEGATRON_QWENVL_ MKL_ NCCL_ NVIDIA_ NVTE_ OMP_ OMPI_ PMI_ PMIX_ PYTORCH_ "
    "SLURM_ SLURMD_ TORCH_ TORCHELASTIC_ TRITON_ UCX_"
).split()
VARIABLES = (
    "CONDA_PREFIX GROUP_RANK LANG LC_ALL LD_LIBRARY_PATH LD_PRELOAD LOCAL_RANK LOCAL_WORLD_SIZE PYTHONHASHSEED "
    "PYTHONPATH RANK TMPDIR TZ VIRTUAL_ENV WORLD_SIZE"
).split()
SECRETS = "AUTH COOKIE CREDENTIAL JWT KEY PASSWD PASSWORD SECRET TOKEN".split()
"""A variable with one of these words in its name is never recorded."""

_TOOL_SECONDS = 10


@dataclass(frozen=True)
class Gpu:
    """One GPU that is visible to this process."""

    name: str
    """Model, such as `NVIDIA H100 80GB HBM3`."""
    memory_bytes: int
    """Total memory of the GPU."""


@dataclass(frozen=True)
class Environment:
    """Machine, software, command and variables of one process, as far as they can affect its run."""

    host: str
    """Name of the machine."""
    node: str
    """Slurm's name of the machine; the host name outside of Slurm."""
    platform: str
    """Operating system, kernel and processor."""
    python: str
    """Version of Python."""
    packages: dict[str, str]
    """Versions of this package and of the installed ones of `PACKAGES`."""
    cuda: str | None
    """CUDA version that torch was built for."""
    driver: str | None
    """Version of the GPU driver."""
    gpus: tuple[Gpu, ...]
    """The GPUs that are visible to this process, by device index."""
    git_revision: str | None
    """Commit of the code; None outside of a git checkout."""
    git_dirty: bool | None
    """Whether tracked files differ from that commit; None outside of a git checkout."""
    command: tuple[str, ...]
    """The command line."""
    launcher: str
    """The program that started the process, as in `ProcessInfo`."""
    variables: dict[str, str]
    """Environment variables that can affect a run, without secrets."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def describe_environment(process: ProcessInfo, env: Mapping[str, str] | None = None) -> Environment:
    """Describe the environment of this process; imports torch, needs no process group and allocates no GPU memory.

    Args:
        process: rank and launcher of this process.
        env: environment variables; default: those of this process.
    """
    env = os.environ if env is None else env
    revision, dirty = git_state(Path(__file__).resolve().parents[2])
    host = socket.gethostname()
    return Environment(
        host=host,
        node=env.get("SLURMD_NODENAME") or host,
        platform=platform.platform(),
        python=platform.python_version(),
        packages=package_versions(),
        cuda=_cuda_version(),
        driver=driver_version(),
        gpus=_gpus(),
        git_revision=revision,
        git_dirty=dirty,
        command=(sys.executable, *sys.argv),
        launcher=process.launcher,
        variables=recorded_variables(env),
    )


def facts_equal_on_all_ranks(environment: Environment) -> dict[str, str]:
    """Facts that must be equal on all ranks of a run, by their name in messages."""
    facts = {"python": environment.python, **environment.packages}
    facts["CUDA"] = str(environment.cuda)
    facts["GPU driver"] = str(environment.driver)
    facts["GPU model"] = ", ".join(sorted({gpu.name for gpu in environment.gpus})) or "none"
    facts["code"] = _code(environment)
    return facts


def _code(environment: Environment) -> str:
    if environment.git_revision is None:
        return "not a git checkout"
    return environment.git_revision[:12] + (" with changes" if environment.git_dirty else "")


def package_versions() -> dict[str, str]:
    """Installed version of each package, this package first."""
    found = {"megatron-qwenvl": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def recorded_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that can affect a run, sorted by name, without any that may hold a secret."""
    return {
        name: env[name]
        for name in sorted(env)
        if (name in VARIABLES or name.startswith(tuple(VARIABLE_PREFIXES)))
        and not any(word in name.upper() for word in SECRETS)
    }


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout at `root`, and whether its tracked files were changed; (None, None) without a checkout."""
    if not (root / ".git").exists():  # installed, perhaps below another project's checkout
        return None, None
    git = ("git", "--no-optional-locks", "-C", str(root))
    revision = _output([*git, "rev-parse", "HEAD"])
    changes = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return revision, None if changes is None else bool(changes)


def driver_version() -> str | None:
    """Version of the NVIDIA driver of this machine; None without one."""
    found = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found.splitlines()[0].strip() if found else None


def _output(command: Sequence[str]) -> str | None:
    """Standard output of a command, stripped; None if the command is missing, fails or hangs."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _cuda_version() -> str | None:
    import torch

    return torch.version.cuda


def _gpus() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    properties = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return tuple(Gpu(found.name, found.total_memory) for found in properties)
