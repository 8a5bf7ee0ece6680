"""Stand-ins for the CUDA libraries that torch's CUDA build links, so that it loads on a machine without them.

The loader asks for a file of each library's name and for a definition of each function with its symbol version; CPU
code calls none of them. Every function here answers 100, which is CUDA's "no CUDA-capable device is detected": torch
then reports no GPU. The files lie in torch/lib, which torch's run path searches after the real libraries' places.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

# Libraries of CUDA packages; the driver (libcuda) is opened on demand only and never replaced.
CUDA_LIBRARY = re.compile(r"lib(nccl|nv|cu(?!da\.))\w*\.so")
NO_DEVICE = "int {name}(void) {{ return 100; }}\n"
TEXT = 'const char *{name}(void) {{ return "no CUDA: a stand-in of the CPU environment"; }}\n'

# Names of undefined functions by symbol version; "" holds those without a version.
Undefined = dict[str, set[str]]


class StandInError(RuntimeError):
    """The stand-ins cannot be made here."""


def _run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        raise StandInError(f"{command[0]} is needed to make torch's CUDA build loadable: apt-get install gcc")
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise StandInError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


def _binaries(package: Path) -> list[Path]:
    """Torch's own binaries, without stand-ins of an earlier call."""
    files = [*package.glob("lib/*.so*"), *package.glob("_C*.so")]
    return sorted(file for file in files if not CUDA_LIBRARY.match(file.name))


def linked_cuda_libraries(package: Path) -> list[str]:
    """Names of the CUDA libraries that the binaries of the torch in `package` link; empty for a CPU build.

    A CPU build is recognized without readelf.
    """
    if not (package / "lib" / "libtorch_cuda.so").exists():
        return []
    dynamic = _run("readelf", "-dW", *map(str, _binaries(package)))
    return sorted(name for name in set(re.findall(r"NEEDED.*\[(.*)\]", dynamic)) if CUDA_LIBRARY.match(name))


def _undefined_functions(package: Path) -> Undefined:
    """What no binary of torch itself defines."""
    undefined: Undefined = defaultdict(set)
    defined = set()
    for line in _run("readelf", "--dyn-syms", "-W", *map(str, _binaries(package))).splitlines():
        match = re.match(r"\s*\d+:(?:\s+\S+){5}\s+(\S+)\s+(\w+)(?:@+(\S+))?", line)
        if match is None:
            continue
        section, name, version = match.groups(default="")
        if section == "UND":
            undefined[version].add(name)
        else:
            defined.add(name)
    undefined[""] -= defined
    return undefined


def functions_of(library: str, undefined: Undefined) -> Undefined:
    """Those of the undefined functions that `library` has to provide.

    NVIDIA names a symbol version after the library's file (libcublas.so.13) or its stem (NVSHMEM), and functions
    without a version after the stem (ncclSend, cuFileRead).
    """
    stem = re.sub(r"lib([A-Za-z]+).*", r"\1", library).lower()
    wanted = {
        version: names
        for version, names in undefined.items()
        if version == library or version.lower() == stem
    }
    unversioned = {name for name in undefined.get("", set()) if name.lower().startswith(stem)}
    return {**wanted, "": unversioned}


def _source(functions: Undefined) -> str:
    names = sorted(set().union(*functions.values()))
    return "".join((TEXT if "GetError" in name else NO_DEVICE).format(name=name) for name in names)


def _version_script(functions: Undefined) -> str:
    return "".join(
        f"{version} {{ global: {'; '.join(sorted(names))}; }};\n"
        for version, names in functions.items()
        if version and names
    )


def make_stand_ins(package: Path, libraries: Sequence[str]) -> None:
    """Compile a stand-in for each of the CUDA libraries that the torch in `package` links, into its folder lib/.

    Raises:
        StandInError: gcc or readelf is missing or fails.
    """
    undefined = _undefined_functions(package)
    with tempfile.TemporaryDirectory() as directory:
        source, script = Path(directory, "functions.c"), Path(directory, "versions")
        for library in libraries:
            functions = functions_of(library, undefined)
            source.write_text(_source(functions), encoding="utf-8")
            script.write_text(_version_script(functions), encoding="utf-8")
            link = [
                f"-Wl,-soname,{library}",
                *([f"-Wl,--version-script={script}"] if script.stat().st_size else []),
            ]
            target = package / "lib" / library
            _run("gcc", "-shared", "-fPIC", "-w", "-O1", *link, "-o", str(target), str(source))
