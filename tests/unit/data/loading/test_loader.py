from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
import torch

from megatron_qwenvl.batch import Batch, DataNeeds
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.loading.loader import StepLoader, build_loader
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer
from tests.unit.data.data_cases import mixed_samples, run_config, write_source


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_source(path / "a", mixed_samples(60, seed=1))
    write_source(path / "b", mixed_samples(30, seed=2))
    return path


def environment() -> dict[str, str]:
    """For a program that is not in the repository."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}


def first_steps(loader: StepLoader, count: int) -> list[list[Batch]]:
    return [list(step) for step in itertools.islice(loader, count)]


def assert_equal(left: Iterable[list[Batch]], right: Iterable[list[Batch]]) -> None:
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            for name, value in vars(a).items():
                same = (
                    torch.equal(value, vars(b)[name])
                    if isinstance(value, torch.Tensor)
                    else value == vars(b)[name]
                )
                assert same, name


@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_workers_change_nothing(root: Path, packing: str) -> None:
    config = run_config(root, {"a": 2, "b": 1}, packing=packing)
    alone = first_steps(build_loader(config), 4)
    with_workers = config.model_copy(
        update={"data": config.data.model_copy(update={"workers": 2, "prefetch": 2})}
    )
    assert_equal(first_steps(build_loader(with_workers), 4), alone)


def test_resume_gives_the_steps_that_follow(root: Path) -> None:
    config = run_config(root, {"a": 2, "b": 1})
    assert_equal(first_steps(build_loader(config, first_step=3), 2), first_steps(build_loader(config), 5)[3:])


def test_ranks_share_a_step(root: Path) -> None:
    config = run_config(root, {"a": 2, "b": 1})
    (whole,) = itertools.islice(build_loader(config), 1)
    parts = [next(iter(build_loader(config, dp_rank=rank, dp_size=3))) for rank in range(3)]
    assert sorted(itertools.chain(*(part.sample_names() for part in parts))) == sorted(whole.sample_names())
    assert len({len(part) for part in parts}) == 1
    batches = [list(part) for part in parts]
    info = parts[0].info
    assert all(part.info == info for part in parts)
    assert [len(part) for part in batches] == [info.micro_batches] * 3
    everything = list(itertools.chain(*batches))
    assert info.samples == sum(batch.num_samples for batch in everything) == 24
    assert info.images == sum(batch.num_images for batch in everything)
    assert info.tokens == sum(batch.real_tokens for batch in everything)
    assert info.positions == sum(batch.length for batch in everything)
    assert info.padding == pytest.approx(1 - info.tokens / info.positions)


def test_what_is_not_taken_of_a_step_is_dropped(root: Path) -> None:
    config = run_config(root, {"a": 2, "b": 1})
    expected = first_steps(build_loader(config), 3)
    for number, step in enumerate(itertools.islice(build_loader(config), 3)):
        taken = list(itertools.islice(step, 1 if number == 1 else None))
        assert_equal([taken], [expected[number][: len(taken)]])


def test_training_ends_with_the_last_step(root: Path) -> None:
    config = run_config(root, {"a": 1})
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 5})})
    loader = build_loader(config, first_step=3, needs=DataNeeds(False, False))
    assert [step.info.step for step in loader] == [3, 4]
    assert len(loader) == 2


def test_validation_is_one_step_repeated_exactly(root: Path) -> None:
    config = run_config(root, {"a": 1})
    data = config.data.model_copy(update={"validation_sources": run_config(root, {"b": 1}).data.sources})
    config = config.model_copy(update={"data": data})
    loader = build_loader(config, split="validation")
    (step,) = loader
    assert step.info.samples == 30
    assert {name.rpartition(":")[0].split("/")[-2] for name in step.sample_names()} == {"b"}
    assert_equal(first_steps(loader, 1), first_steps(build_loader(config, split="validation"), 1))


def test_the_models_random_numbers_are_left_alone(root: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first_steps(build_loader(run_config(root, {"a": 1})), 2)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_stops_with_its_name(tmp_path: Path, workers: int) -> None:
    write_source(tmp_path / "s", mixed_samples(20))
    loader = build_loader(run_config(tmp_path, {"s": 1}, workers=workers))
    (tmp_path / "s" / "000001.tar").unlink()
    with pytest.raises(DataError, match=r"000001\.tar: cannot read the shard: No such file") as caught:
        first_steps(loader, 3)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_larger_than_the_model_is_refused(root: Path, qwen: Tokenizer) -> None:
    with pytest.raises(DataError, match="151860 tokens do not fit model"):
        build_loader(run_config(root, {"a": 1}), tokenizer=qwen)


@pytest.mark.slow
def test_workers_do_not_import_the_training_program(root: Path, tmp_path: Path) -> None:
    """Neither again in every worker, nor a second copy of the process with all that it holds."""
    config = run_config(root, {"a": 1}, workers=1).model_dump_json()
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        import os
        print("imported", os.getpid(), flush=True)
        from megatron_qwenvl.config.schema import RunConfig
        from megatron_qwenvl.data.loading.loader import build_loader
        loader = build_loader(RunConfig.model_validate_json({config!r}))
        print("samples", sum(batch.num_samples for batch in next(iter(loader))), flush=True)
        """)
    )
    result = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=300, env=environment(), check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("imported") == 1
    assert "samples 24" in result.stdout


@pytest.mark.slow
def test_workers_end_when_the_training_process_is_killed(root: Path, tmp_path: Path) -> None:
    """And the fork server removes the directory of its socket."""
    config = run_config(root, {"a": 1}, workers=2).model_dump_json()
    program = f"""if True:
        import time
        from megatron_qwenvl.config.schema import RunConfig
        from megatron_qwenvl.data.loading.loader import build_loader
        steps = iter(build_loader(RunConfig.model_validate_json({config!r})))
        print(len(list(next(steps))), flush=True)
        time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**environment(), "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        assert len(list(tmp_path.glob("pymp-*"))) == 1
        descendants = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(descendants) >= 4  # fork server, resource tracker, two workers
    _, alive = psutil.wait_procs(descendants, timeout=120)
    for survivor in alive:
        survivor.kill()
    assert not alive
    assert list(tmp_path.glob("pymp-*")) == []


@pytest.mark.slow
def test_a_process_that_still_holds_its_loader_ends(root: Path) -> None:
    """As one that fails does: the traceback of its error holds the loader to the very end."""
    config = run_config(root, {"a": 1}, workers=2).model_dump_json()
    program = f"""if True:
        from megatron_qwenvl.config.schema import RunConfig
        from megatron_qwenvl.data.loading.loader import build_loader
        steps = iter(build_loader(RunConfig.model_validate_json({config!r})))
        print(len(list(next(steps))), flush=True)
    """
    subprocess.run([sys.executable, "-c", program], timeout=300, env=environment(), check=True)


def test_a_stage_that_reads_nothing_starts_no_worker(root: Path) -> None:
    loader = build_loader(run_config(root, {"a": 1}, workers=2), needs=DataNeeds(pixels=False, tokens=False))
    before = set(multiprocessing.active_children())  # workers of earlier tests may be ending
    steps = iter(loader)
    next(steps)
    assert set(multiprocessing.active_children()) <= before


def test_config_is_untouched(root: Path) -> None:
    config: RunConfig = run_config(root, {"a": 1})
    before = config.model_dump()
    first_steps(build_loader(config), 1)
    assert config.model_dump() == before
