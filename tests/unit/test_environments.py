"""Environments: each Python has its own, a Python that is found runs, and torch loads without CUDA's libraries."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_stand_ins import StandInError, functions_of, linked_cuda_libraries, make_stand_ins
from install_torch import forget_cuda_packages

ROOT = Path(__file__).parents[2]


def interpreter(path: Path, series: str) -> Path:
    """A program that answers as a Python of `series` when make asks it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\ncase "$2" in *version_info*) echo {series};; esac\n')
    path.chmod(0o755)
    return path


def broken_shim(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    path.chmod(0o755)


class Machine:
    """A PATH and a pyenv in a directory, with python3 of the series 3.11, no other Python, and what make reads."""

    def __init__(self, root: Path) -> None:
        self.bin, self.pyenv, self.project = root / "bin", root / "pyenv", root / "project"
        interpreter(self.bin / "python3", "3.11")
        for tool in ("make", "sh", "sort"):
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.project.mkdir()
        shutil.copy(ROOT / "Makefile", self.project)
        shutil.copy(ROOT / "pyproject.toml", self.project)
        shutil.copytree(ROOT / "requirements", self.project / "requirements")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.pyenv.parent), "PYENV_ROOT": str(self.pyenv)}
        return subprocess.run(command, cwd=self.project, env=environment, text=True, capture_output=True)

    def found(self, name: str) -> str:
        return self.run("sh", "requirements/find_python.sh", name).stdout.strip()

    def plan(self, *arguments: str) -> str:
        """What make would do."""
        done = self.run("make", "--dry-run", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_shim_that_fails_is_no_python(machine: Machine) -> None:
    broken_shim(machine.bin / "python3.12")
    assert machine.found("python3.12") == ""


def test_a_python_of_pyenv_stands_behind_its_shim(machine: Machine) -> None:
    broken_shim(machine.bin / "python3.12")
    interpreter(machine.pyenv / "versions/3.12.4/bin/python", "3.12")
    newest = interpreter(machine.pyenv / "versions/3.12.10/bin/python", "3.12")
    broken_shim(machine.pyenv / "versions/3.12.11/bin/python")
    assert machine.found("python3.12") == str(newest)


def test_a_python_that_runs_is_taken_before_pyenvs(machine: Machine) -> None:
    interpreter(machine.pyenv / "versions/3.12.4/bin/python", "3.12")
    assert machine.found("python3.12") != ""
    on_path = interpreter(machine.bin / "python3.12", "3.12")
    assert machine.found("python3.12") == str(on_path)


def test_an_environment_of_3_11_does_not_serve_3_12(machine: Machine) -> None:
    interpreter(machine.bin / "python3.12", "3.12")
    interpreter(machine.project / ".venv/bin/python", "3.11")
    (machine.project / ".venv/.installed-3.11").touch()
    assert ".venv/bin/python -m pytest" in machine.plan("test")
    assert "-m venv" not in machine.plan("test")
    plan = machine.plan("test", "PYTHON=python3.12")
    assert "-m venv --clear .venv-3.12" in plan
    assert ".venv-3.12/bin/python -m pytest" in plan
    assert ".venv/bin" not in plan


def test_an_environment_of_another_python3_is_made_anew(machine: Machine) -> None:
    interpreter(machine.project / ".venv/bin/python", "3.11")
    (machine.project / ".venv/.installed-3.11").touch()
    interpreter(machine.bin / "python3", "3.12")
    assert "-m venv --clear .venv\n" in machine.plan("test")
    assert "-m venv --clear .venv\n" in machine.plan("test", "PYTHON=python3")


def test_the_engine_of_the_other_python_is_tested_where_there_is_one(machine: Machine) -> None:
    missing = machine.run("make", "test-engines")
    assert (missing.returncode, missing.stdout) == (
        0,
        "No python3.12 was found: its megatron-core is NOT tested here (docs/versions.md)\n",
    )
    interpreter(machine.pyenv / "versions/3.12.4/bin/python", "3.12")
    assert ".venv-3.12/bin/python -m pytest" in machine.plan("test-engines")
    interpreter(machine.bin / "python3", "3.12")
    interpreter(machine.bin / "python3.11", "3.11")
    assert ".venv-3.11/bin/python -m pytest" in machine.plan("test-engines")


def test_a_python_that_is_missing_is_named(machine: Machine) -> None:
    done = machine.run("make", "setup", "PYTHON=python3.12")
    assert done.returncode != 0
    assert done.stdout == "PYTHON=python3.12: no such Python runs here\n"


def test_functions_of_a_library_are_known_by_version_or_stem() -> None:
    undefined = {
        "libcublas.so.13": {"cublasCreate_v2"},
        "libcublasLt.so.13": {"cublasLtCreate"},
        "NVSHMEM": {"nvshmemx_init"},
        "GLIBC_2.2.5": {"malloc"},
        "": {"ncclSend", "cuFileRead", "cusparseLtInit", "PyErr_Clear", "cuInit"},
    }
    assert functions_of("libcublas.so.13", undefined) == {"libcublas.so.13": {"cublasCreate_v2"}, "": set()}
    assert functions_of("libnvshmem_host.so.3", undefined) == {"NVSHMEM": {"nvshmemx_init"}, "": set()}
    assert functions_of("libnccl.so.2", undefined) == {"": {"ncclSend"}}
    assert functions_of("libcufile.so.0", undefined) == {"": {"cuFileRead"}}
    assert functions_of("libcusparseLt.so.0", undefined) == {"": {"cusparseLtInit"}}


def compile_library(target: Path, source: str, *options: str) -> None:
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        "-o",
        str(target),
        "-x",
        "c",
        "-",
        f"-Wl,-soname,{target.name}",
        *options,
    ]
    subprocess.run(command, input=source, text=True, check=True)


needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


@pytest.fixture
def torch_package(tmp_path: Path) -> Path:
    """A package as torch's CUDA build: a library that links two of CUDA's, which are not there any more.

    They bear names of their own, because the process that tests may have loaded torch's stand-ins.
    """
    lib = tmp_path / "torch/lib"
    lib.mkdir(parents=True)
    versions = tmp_path / "versions"
    versions.write_text("libcutest.so.7 { global: cutestCreate; };\n")
    compile_library(
        lib / "libcutest.so.7", "int cutestCreate(void) {return 0;}", f"-Wl,--version-script={versions}"
    )
    compile_library(
        lib / "libnvtest.so.1",
        'int nvtestSend(void) {return 0;} const char *nvtestGetErrorString(int i) {return "";}',
    )
    compile_library(
        lib / "libtorch_cuda.so",
        "int cutestCreate(void), nvtestSend(void); const char *nvtestGetErrorString(int);"
        "int calls(void) {return cutestCreate() + nvtestSend();}"
        "const char *says(void) {return nvtestGetErrorString(1);}",
        f"-L{lib}",
        "-l:libcutest.so.7",
        "-l:libnvtest.so.1",
        "-Wl,-z,now,-rpath,$ORIGIN",
    )
    (lib / "libcutest.so.7").unlink()
    (lib / "libnvtest.so.1").unlink()
    return lib.parent


@needs_gcc
def test_torch_loads_with_stand_ins_that_answer_no_device(torch_package: Path) -> None:
    library = str(torch_package / "lib/libtorch_cuda.so")
    libraries = linked_cuda_libraries(torch_package)
    assert libraries == ["libcutest.so.7", "libnvtest.so.1"]
    with pytest.raises(OSError, match="cannot open shared object file"):
        ctypes.CDLL(library)
    for _ in range(2):  # made again over the first ones by the next `make setup`
        make_stand_ins(torch_package, libraries)
    loaded = ctypes.CDLL(library)
    loaded.says.restype = ctypes.c_char_p
    assert loaded.calls() == 200
    assert b"no CUDA" in loaded.says()


@needs_gcc
def test_a_machine_without_a_compiler_is_told_what_to_install(
    torch_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(torch_package))
    with pytest.raises(StandInError, match="readelf is needed .*apt-get install gcc"):
        make_stand_ins(torch_package, ["libnvtest.so.1"])


def test_a_cpu_build_needs_no_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "torch/lib").mkdir(parents=True)
    assert linked_cuda_libraries(tmp_path / "torch") == []


def test_pip_does_not_install_the_cuda_packages_later(tmp_path: Path) -> None:
    kept = ["Name: torch\n", "Requires-Dist: filelock\n", "\n", "The nvidia- text\n"]
    metadata = tmp_path / "METADATA"
    cuda = ["cuda-bindings<14", 'nvidia-nccl-cu13==2.29.7; platform_system == "Linux"', "triton==3.7.1"]
    metadata.write_text("".join([*kept[:2], *(f"Requires-Dist: {name}\n" for name in cuda), *kept[2:]]))
    forget_cuda_packages(metadata)
    assert metadata.read_text() == "".join(kept)
