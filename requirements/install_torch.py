"""Install torch for CPU into the environment whose Python runs this file; `make setup` calls it.

    python requirements/install_torch.py [--index URL] [--source auto|index|pypi]

The version is the one that requirements/cpu.txt pins. PyTorch's CPU index has a build without CUDA (200 MB). Where that
index cannot be reached (`auto`), or with `--source pypi`, torch comes from pip's own index, whose build for Linux links
the CUDA libraries. They are several gigabytes of packages and no CPU code calls them, so they are left out:
cuda_stand_ins.py makes small libraries in their place, and torch's metadata no longer asks for the packages. That way
costs 530 MB to download, 1.2 GB of disk and half a minute, and needs gcc and readelf (`apt-get install gcc`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

from cuda_stand_ins import StandInError, linked_cuda_libraries, make_stand_ins

PINS = Path(__file__).with_name("cpu.txt")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What torch's CUDA build requires beyond its CPU build.
CUDA_PACKAGE = re.compile(r"Requires-Dist: (cuda-|nvidia-|triton\b)")


def pinned_version() -> str:
    """Version of torch in requirements/cpu.txt."""
    pin = re.search(r"^torch==(\S+)", PINS.read_text(encoding="utf-8"), re.MULTILINE)
    if pin is None:
        raise SystemExit(f"{PINS}: expected a line torch==VERSION, found none")
    return pin.group(1)


def pip_install(requirement: str, *options: str) -> bool:
    """Install one package without what it requires; whether pip did."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--retries",
        "1",
        *options,
        requirement,
    ]
    return subprocess.run(command).returncode == 0


def install(index: str, source: str) -> None:
    """Install the pinned torch from where `source` says, and say where it came from."""
    requirement = f"torch=={pinned_version()}"
    if source != "pypi":
        if pip_install(requirement, "--index-url", index):
            return
        if source == "index":
            raise SystemExit(f"{requirement}: not found at {index}")
        print(f"{requirement}: not found at {index}; taking PyPI's build, 530 MB, without its CUDA packages")
    if not pip_install(requirement):
        raise SystemExit(f"{requirement}: not found at pip's index either")


def forget_cuda_packages(metadata: Path) -> None:
    """Take the CUDA packages out of the METADATA of the installed torch, so that pip does not install them later."""
    lines = metadata.read_text(encoding="utf-8").splitlines(keepends=True)
    metadata.write_text("".join(line for line in lines if not CUDA_PACKAGE.match(line)), encoding="utf-8")


def make_loadable(torch: importlib.metadata.Distribution) -> None:
    """Make a CUDA build loadable without CUDA; a CPU build needs nothing."""
    packaged = {file.name: Path(str(file.locate())) for file in torch.files or []}
    package = Path(str(torch.locate_file("torch")))
    missing = [name for name in linked_cuda_libraries(package) if name not in packaged]
    if not missing:
        return
    make_stand_ins(package, missing)
    forget_cuda_packages(packaged["METADATA"])
    print(
        f"torch is a CUDA build: made {len(missing)} stand-ins for CUDA libraries in {package / 'lib'}; CPU only"
    )


def main() -> None:
    """Install torch and make it loadable."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--index", default=CPU_INDEX, help="index with the CPU build (default: %(default)s)")
    parser.add_argument("--source", choices=["auto", "index", "pypi"], default="auto")
    arguments = parser.parse_args()
    install(arguments.index, arguments.source)
    try:
        make_loadable(importlib.metadata.distribution("torch"))
    except StandInError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
