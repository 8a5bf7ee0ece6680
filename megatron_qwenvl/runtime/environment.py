"""Where a process runs: node, versions, GPUs, code and the variables that matter.

Saved with every run, and compared between ranks before one starts. Nothing here fails where a tool is missing: what
cannot be found out is None.
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
"""Packages whose version can change what a run computes or reads."""

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
    """One GPU that this process sees."""

    name: str
    """Model, such as `NVIDIA H100 80GB HBM3`."""
    memory_bytes: int
    """Its whole memory."""


@dataclass(frozen=True)
class Environment:
    """Everything about the place of one process that can matter to its run."""

    host: str
    """Name of the machine."""
    node: str
    """Name by which the scheduler knows it; the host's where there is none."""
    platform: str
    """Operating system, kernel and processor."""
    python: str
    """Version of Python."""
    packages: dict[str, str]
    """Versions of this package and of those of `PACKAGES` that are installed."""
    cuda: str | None
    """CUDA version that torch was built for."""
    driver: str | None
    """Version of the GPU driver."""
    gpus: tuple[Gpu, ...]
    """The GPUs that this process sees, in its order."""
    git_revision: str | None
    """Commit of the code, where it is a git checkout."""
    git_dirty: bool | None
    """Whether tracked files differ from that commit."""
    command: tuple[str, ...]
    """The command line."""
    launcher: str
    """Who started the process, as in `ProcessInfo`."""
    variables: dict[str, str]
    """The environment variables that matter, without secrets."""

    def to_json(self) -> dict[str, Any]:
        """JSON values, field by field."""
        return asdict(self)


def describe_environment(process: ProcessInfo, env: Mapping[str, str] | None = None) -> Environment:
    """Describe where this process runs; imports torch, needs no process group and takes no GPU memory.

    Args:
        process: the place of this process in its run.
        env: environment variables; left out, this process's.
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
        variables=chosen_variables(env),
    )


def common_facts(environment: Environment) -> dict[str, str]:
    """What must be equal on all ranks of a run, by the name to call it by."""
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
    """Installed versions, this package first."""
    found = {"megatron-qwenvl": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def chosen_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that matter, sorted by name, without any that could hold a secret."""
    return {
        name: env[name]
        for name in sorted(env)
        if (name in VARIABLES or name.startswith(tuple(VARIABLE_PREFIXES)))
        and not any(word in name.upper() for word in SECRETS)
    }


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout at `root`, and whether its tracked files were changed; (None, None) if it is none."""
    if not (root / ".git").exists():  # installed, perhaps below somebody else's checkout
        return None, None
    git = ("git", "--no-optional-locks", "-C", str(root))
    revision = _output([*git, "rev-parse", "HEAD"])
    changes = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return revision, None if changes is None else bool(changes)


def driver_version() -> str | None:
    """Version of NVIDIA's driver on this machine, or None without one."""
    found = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found.splitlines()[0].strip() if found else None


def _output(command: Sequence[str]) -> str | None:
    """What a tool prints, stripped; None where it is missing, fails or hangs."""
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
