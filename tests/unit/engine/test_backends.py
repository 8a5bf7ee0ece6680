from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_qwenvl.engine.backends import LayerBackendError, choose_backend


def install_foreign_apex(folder: Path) -> None:
    """What `pip install apex` brings: the toolkit for the Pyramid web framework."""
    (folder / "apex").mkdir()
    (folder / "apex" / "__init__.py").write_text("")
    info = folder / "apex-0.9.10.dev0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\nRequires-Dist: pyramid (>1.1.2)\n"
    )


def test_auto_on_cpu_is_torch_and_says_why() -> None:
    kernels = choose_backend("auto", on_gpu=False)
    assert kernels.name == "torch"
    assert "Transformer Engine needs a GPU" in kernels.describe()


@pytest.mark.parametrize("name", ["te", "apex"])
def test_kernels_asked_for_by_name_must_work(name: str) -> None:
    with pytest.raises(LayerBackendError, match=f"runtime.kernels: {name} was asked for"):
        choose_backend(name, on_gpu=False)  # type: ignore[arg-type]


def test_the_other_apex_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_foreign_apex(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(LayerBackendError, match="web toolkit, not NVIDIA apex"):
        choose_backend("apex", on_gpu=True)
