"""Builds the model from Transformer Engine's modules on a machine without a GPU, and says what it would save.

    python -m tests.te_contract_probe

prints, as JSON, what `tests.unit.test_te_contract.describe_rank` says on each of two tensor-parallel ranks.

Transformer Engine's Python code makes its modules of torch parameters; only computing needs its CUDA libraries. So
what is missing is replaced by stand-ins (the C++ extension, triton, onnx), torch is made to describe an H100, and
the model is built on the CPU. Nothing can be computed that way, and nothing else may run in such a process. The
package lies in a directory of its own, where `make setup` puts it: importable without its libraries, it would make
megatron-core fail everywhere else.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torch._dynamo  # looks for triton, so it comes before the stand-ins

TE_DIRECTORY = Path(sys.prefix) / "te-contract"
# Data types of the C++ extension: Transformer Engine 2.17 and later compares their names with a list of its own.
DTYPE = enum.IntEnum(
    "DType",
    "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1",
    start=0,
)
ABSENT = ("transformer_engine_torch", "triton", "onnx", "onnxscript")


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers imports of the absent packages with modules that have every attribute."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)
            if name.split(".")[0] in ABSENT
            else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return MagicMock(name=spec.name, __all__=[], __version__="3.5.0", DType=DTYPE)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to execute."""


def prepare_environment() -> None:
    """Make Transformer Engine's modules constructible on the CPU of this process.

    Raises:
        FileNotFoundError: the package is not where `make setup` puts it.
    """
    if not (TE_DIRECTORY / "transformer_engine").is_dir():
        raise FileNotFoundError(f"expected transformer_engine in {TE_DIRECTORY}: run `make setup`")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # skips the search for CUDA libraries
    sys.path.append(str(TE_DIRECTORY))
    sys.meta_path.append(_StandIns())
    _describe_h100()
    with warnings.catch_warnings(
        action="ignore"
    ):  # the import of the parent package tries to load the extension
        import transformer_engine.common
    transformer_engine.common.load_framework_extension = lambda framework: None
    from transformer_engine.pytorch import cpp_extensions

    cpp_extensions.get_cudnn_version = lambda: 91000


def _describe_h100() -> None:
    torch.compile = _do_not_compile  # type: ignore[assignment]  # would look for a real triton
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(  # type: ignore[assignment]
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )


def _do_not_compile(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    return function or (lambda inner: inner)


def main() -> None:
    """Build on two ranks and print."""
    prepare_environment()
    # Whatever imports megatron-core must come after Transformer Engine.
    from tests.distributed.harness import run_ranks
    from tests.unit.test_te_contract import describe_rank

    print(json.dumps(run_ranks(2, describe_rank, "te")))


if __name__ == "__main__":
    main()
