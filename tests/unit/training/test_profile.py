"""Layouts and launchers of a throughput measurement, and the reasons of runs that fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_qwenvl.config.load import load_config
from megatron_qwenvl.profiling.layouts import (
    Launcher,
    Layout,
    Measurement,
    ProfileError,
    failure_reason,
    layout_folder,
    run_overrides,
    validate_layouts,
)

LAUNCH = Path(__file__).parents[3] / "launch"


def measurement(tmp_path: Path, processes: int = 4, **values: object) -> Measurement:
    launcher = Launcher.find(LAUNCH / "local.sh", processes, {})
    return Measurement("tiny_stage2", launcher, tmp_path / "out: put", **values)  # type: ignore[arg-type]


def test_a_layout_sets_any_field(tmp_path: Path) -> None:
    layout = Layout.parse(" tensor=2  pipeline=2 'layout=[5]' train.recompute=full data.pack_length=800 ")
    plan = measurement(tmp_path, overrides=("--seed", "7", "--data.pack_length", "600"), steps=4, warmup=2)
    folder = layout_folder(plan, [layout], 0)
    config = load_config(plan.recipe, run_overrides(plan, layout, folder), 4)
    assert (config.parallel.tensor, config.parallel.pipeline, config.parallel.layout) == (2, 2, (5,))
    assert (config.train.recompute, config.data.pack_length, config.seed) == ("full", 800, 7)
    assert (config.train.stop_after, config.checkpoint.save, config.run_dir) == (6, False, str(folder))
    assert (config.logging.interval, config.train.validation_interval) == (1, 0)
    assert folder.parent == plan.out and folder.name.startswith("01_tensor=2_pipeline=2_")


def test_weights_are_fresh_unless_some_are_given(tmp_path: Path) -> None:
    layout = Layout.parse("")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: tiny_stage2\ncheckpoint: {init_from: weights/stage2_start}\n")
    for overrides, expected in (((), None), (("--checkpoint.init_from", "mine"), "mine")):
        plan = measurement(tmp_path, overrides=overrides)
        config = load_config(str(recipe), run_overrides(plan, layout, tmp_path))
        assert config.checkpoint.init_from == expected


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    layouts = [Layout.parse(text) for text in ("tensor=3", "tensor=2", "pipelines=2", "train.stop_after=3")]
    with pytest.raises(ProfileError) as error:
        validate_layouts(measurement(tmp_path), layouts)
    text = str(error.value)
    assert "layout tensor=3: configuration tiny_stage2" in text
    assert "a multiple of 3 x 1 = 3, found 4" in text
    assert "layout pipelines=2: " in text and "parallel.pipelines: unknown key" in text
    assert "layout train.stop_after=3: train.stop_after: set by the measurement itself" in text
    assert "layout tensor=2" not in text
    validate_layouts(measurement(tmp_path), [Layout.parse("tensor=2")])


def test_a_problem_of_all_layouts_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(ProfileError) as error:
        validate_layouts(
            measurement(tmp_path, steps=9999), [Layout.parse("tensor=2"), Layout.parse("pipeline=2")]
        )
    assert str(error.value).count("train.stop_after: expected at most train.steps") == 1
    assert str(error.value).startswith("layout tensor=2; pipeline=2: ")


@pytest.mark.parametrize("text", ["tensor", "tensor=2 --pipeline=2", "tensor='2"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ProfileError, match="--layout"):
        Layout.parse(text)


def test_the_launcher_says_how_many_processes() -> None:
    allocation = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16"}
    for script, given, environment, expected in (
        ("local.sh", None, {}, 1),
        ("local.sh", None, allocation, 1),
        ("local.sh", None, {"NPROC": "3"}, 3),
        ("mpirun.sh", None, {}, 1),
        ("mpirun.sh", None, allocation, 16),
        ("srun.sh", None, allocation, 16),
        ("srun.sh", None, {**allocation, "NPROC": "4"}, 4),
        ("srun.sh", 8, {**allocation, "NPROC": "4"}, 8),
    ):
        assert Launcher.find(LAUNCH / script, given, environment).processes == expected
    for script, given, environment, message in (
        ("srun.sh", None, {}, "expected a number, there or in NPROC, found ''"),
        ("mpirun.sh", None, {"HOSTS": "a:4,b:4"}, "expected a number, there or in NPROC, found ''"),
        ("local.sh", 0, {}, "found '0'"),
        ("nowhere.sh", 2, {}, "--launcher"),
        ("env.sh", 2, {}, "--launcher"),
    ):
        with pytest.raises(ProfileError, match=message):
            Launcher.find(LAUNCH / script, given, environment)


def test_the_launcher_starts_the_training_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROGRAM", "tools/preflight.py")
    environment = Launcher.find(LAUNCH / "local.sh", 4, {}).environment()
    assert environment["NPROC"] == "4" and "PROGRAM" not in environment and "PATH" in environment


TORCHRUN = """
W1124 13:00:00 torch/distributed/elastic/multiprocessing/api.py:908] Sending process 3 closing signal SIGTERM
Traceback (most recent call last):
  File "torch/distributed/launcher/api.py", line 138, in __call__
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "2026-11-24 13:00:00,1 [rank 1] FAILED (error) DataError: /data/x: no shards\n"
            "2026-11-24 13:00:01,1 [rank 0] FAILED (lost peer) RuntimeError: Broken pipe\n" + TORCHRUN,
            "DataError: /data/x: no shards",
        ),
        (
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
            "RuntimeError: work was aborted\n"
            "torch.distributed.DistBackendError: NCCL error: remote process exited\n" + TORCHRUN,
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        ),
        (
            "Traceback (most recent call last):\nAssertionError\n"
            "RuntimeError: [gloo/tcp/pair.cc:534] Connection closed by peer\n" + TORCHRUN,
            "AssertionError",
        ),
        (
            "RuntimeError: [gloo/tcp/pair.cc:534] Connection closed by peer\n" + TORCHRUN,
            "RuntimeError: [gloo/tcp/pair.cc:534] Connection closed by peer",
        ),
        (
            TORCHRUN + "  traceback : Signal 9 (SIGKILL) received by PID 71\n",
            "Signal 9 (SIGKILL) received by PID 71",
        ),
        ("srun: error: node3: task 5: Out Of Memory\n", "error: node3: task 5: Out Of Memory"),
        (
            "python -m megatron_qwenvl.train: configuration stage2: 1 problem\n  parallel.tensor: expected 4\n"
            + TORCHRUN,
            "configuration stage2: 1 problem: parallel.tensor: expected 4",
        ),
        ("bash: mpirun: command not found\n", "bash: mpirun: command not found"),
        ("", "exit code 9 without a word"),
    ],
)
def test_the_reason_of_a_failure(log: str, reason: str) -> None:
    assert failure_reason(log, 9) == reason
