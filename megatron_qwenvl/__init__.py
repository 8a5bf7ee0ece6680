"""Pre-training of Qwen-VL-style vision-language models on megatron-core.

In a program or notebook of one process (examples/notebook.py):

    from megatron_qwenvl import Generator, build_loader, load_config, load_model

The names are imported when they are used: `import megatron_qwenvl` takes no time.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config.load import load_config
    from .data.loading.loader import build_loader
    from .inference.generate import Generator
    from .inference.loaded_model import load_model

__version__ = "0.3.0"
__all__ = ["Generator", "__version__", "build_loader", "load_config", "load_model"]

_HOMES = {
    "Generator": "inference.generate",
    "build_loader": "data.loading.loader",
    "load_config": "config.load",
    "load_model": "inference.loaded_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("Generator", "load_model"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"megatron\.core")  # about kernels that are absent
            import_module(f"{__name__}.engine.start")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
