"""The package in one process, as in a notebook: models come and go, and torch is afterwards as it was before."""

from __future__ import annotations

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import megatron.core.optimizer as optimizers
import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random

import megatron_qwenvl
from megatron_qwenvl import Generator, build_loader, load_config, load_model
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.inference.loaded_model import LoadedModel
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks
from tests.unit.data.data_cases import png_image

from .training_cases import run_arguments, run_config, train, write_data

ROOT = Path(__file__).parents[2]
CHANGED = (
    torch,
    torch.cuda,
    torch.Tensor,
    optimizers,
    distrib_optimizer,
    optimizer,
    clip_grads,
    schedules,
    utils,
    random,
)
QUESTION = {"task": "vqa", "question": "What colour?"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, with a checkpoint."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    (folder / "image.png").write_bytes(png_image())
    layout = ("--parallel.tensor", "2", "--parallel.sequence_parallel", "true")
    run_ranks(2, train, run_config(folder, folder / "run", "--train.stop_after", "2", *layout, world=2))
    return folder / "run"


def state_of_torch() -> dict[str, Any]:
    """Everything that the engine may change in torch and megatron-core, whose own tracker is made at first use."""
    attributes = {
        f"{owner.__name__}.{name}": value
        for owner in CHANGED
        for name, value in vars(owner).items()
        if (not isinstance(value, ModuleType) or name == "torch")
        and not name.startswith("_CUDA_RNG_STATE_TRACKER")
    }
    settings = {"threads": torch.get_num_threads(), "random": torch.get_rng_state().tolist()}
    settings["excepthook"] = sys.excepthook
    return {**attributes, **settings}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [
        name
        for name in before.keys() | after.keys()
        if before.get(name) is not after.get(name)
        and not (name in ("threads", "random") and before[name] == after[name])
    ]


def ask(model: LoadedModel, run: Path) -> list[list[int]]:
    prompts = [
        model.prompt(QUESTION, [run.parent / "image.png"]),
        model.prompt({"task": "text", "text": "red"}),
    ]
    return Generator.of(model).generate(prompts, 6)


def test_models_come_and_go_and_leave_torch_as_it_was(run: Path) -> None:
    run_ranks(
        1, models_come_and_go, run
    )  # in a fork: a process that has computed is no parent of other tests' ranks


def models_come_and_go(_: ProcessInfo, run: Path) -> None:
    config = load_config(str(run / "config.yaml"))
    assert config.parallel.tensor == 2
    pristine = state_of_torch()
    with load_model(config, run) as model:
        first = ask(model, run)
    before = state_of_torch()  # also what modules put into themselves at first use
    assert differences(pristine, {name: before[name] for name in pristine}) == []
    with load_model(config.model_copy(update={"seed": 5}), run) as model:
        assert differences(before, state_of_torch()), "nothing was adapted: the test sees nothing"
        assert ask(model, run) == first
        with pytest.raises(RuntimeError, match="close the model before"):
            load_model(config)
    assert differences(before, state_of_torch()) == []
    with pytest.raises(CheckpointError, match="nowhere"):
        load_model(config, run / "nowhere")
    assert differences(before, state_of_torch()) == []
    fresh = load_model(config)
    fresh.close()
    assert differences(before, state_of_torch()) == []


def test_a_loader_needs_no_engine(run: Path) -> None:
    loader = build_loader(load_config("tiny_stage2", run_arguments(run.parent, run)))
    for _ in range(2):
        (first, *_rest) = next(iter(loader))
        assert first.real_tokens > 0 and first.pixels is not None


def test_the_example_runs(run: Path) -> None:
    (shown,) = run_ranks(1, run_example, run)
    assert "step 0 micro-batch 0: " in shown and "step 1 micro-batch 0: " in shown and "step 2" not in shown
    assert " parameters on cpu\n" in shown and shown.splitlines()[-1].startswith("What colour? ")


def run_example(_: ProcessInfo, run: Path) -> str:
    """What the example prints."""
    example = ROOT / "examples/notebook.py"
    sys.argv = [str(example), str(run), str(run.parent / "image.png"), "What colour?"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        runpy.run_path(str(example), run_name="__main__")
    return shown.getvalue()


def test_the_engine_is_imported_without_warnings() -> None:
    script = "from megatron_qwenvl import Generator, build_loader, load_config, load_model"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_package_imports_nothing_heavy() -> None:
    names = "torch megatron numpy pydantic yaml PIL tiktoken".split()
    script = f"import sys, megatron_qwenvl; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
    assert all(hasattr(megatron_qwenvl, name) for name in megatron_qwenvl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        megatron_qwenvl.load_modle  # noqa: B018
