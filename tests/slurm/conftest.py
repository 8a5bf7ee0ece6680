from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_qwenvl.config.load import load_config
from tests.end_to_end.training_cases import write_data
from tests.unit.checkpoint.hf_cases import random_weights, write_hf

from .cluster import Cluster, missing_programs
from .jobs import STEPS, finish_chain, pipeline, site_of_chain, write_recipe


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Waits end by themselves when what they wait for cannot come any more; the limit is for a hang."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The running cluster; tests are skipped where Slurm is not installed."""
    if missing := missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)} (make slurm-packages)")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the small mixed data set."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("published") / "qwen_vl"
    recipe = write_recipe(tmp_path_factory.mktemp("recipe"), data, "stage1")
    model = load_config(str(recipe)).model
    write_hf(folder, model, random_weights(model))
    return folder


@pytest.fixture(scope="session")
def undisturbed(
    cluster: Cluster, data: Path, published: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A chain that ran without disturbance."""
    folder = tmp_path_factory.mktemp("undisturbed")
    site, run = site_of_chain(folder, data, published), folder / "run"
    planned = pipeline(cluster, site, run, "--dry_run")
    assert planned.returncode == 0, planned.stderr
    assert [line.split(":")[0] for line in planned.stdout.splitlines()] == STEPS
    assert not run.exists()
    done = pipeline(cluster, site, run)
    assert done.returncode == 0, done.stderr
    finish_chain(cluster, run)
    return run


@pytest.fixture(autouse=True)
def no_job_is_left(cluster: Cluster) -> Iterator[None]:
    """A test that fails leaves no job that holds the nodes."""
    yield
    cluster.cancel_all()
