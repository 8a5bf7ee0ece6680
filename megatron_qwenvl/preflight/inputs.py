"""Checks of data, start weights and checkpoints on rank 0 before a run."""

from __future__ import annotations

from pathlib import Path

from megatron_qwenvl.checkpoint.run.start import Start, find_start
from megatron_qwenvl.checkpoint.storage.errors import CheckpointError
from megatron_qwenvl.checkpoint.storage.run_folder import checkpoints_of_run
from megatron_qwenvl.config.cli import RunArguments
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.errors import DataError
from megatron_qwenvl.data.rendering.tokenizer import load_decoder_tokenizer
from megatron_qwenvl.data.sampling.resume import resume_data
from megatron_qwenvl.data.sampling.sampler import StepSampler, open_validation_sampler, training_sampler
from megatron_qwenvl.data.sampling.sources import open_training_sources

from .rules import Finding, ok, run_failure, warning


def check_inputs(run: RunArguments) -> list[Finding]:
    """Check that the checkpoint or start weights fit the run, and that its data can be read from the first step."""
    try:
        start = find_start(run.config, run.from_step)
    except (CheckpointError, OSError) as error:
        return [*check_data(run.config, Start(None, None)), run_failure("weights", str(error))]
    damaged = [warning("weights", f"passed over: {problem}") for problem in start.damaged]
    weights = ok("weights", describe_start(start, run.config))
    return [*check_data(run.config, start), *damaged, weights]


def check_data(config: RunConfig, start: Start) -> list[Finding]:
    """Check that data sources exist, are indexed and fit the tokenizer, and that their changes are permitted."""
    try:
        tokenizer = load_decoder_tokenizer(config).fingerprint
        sources = open_training_sources(config, tokenizer)
        checkpoint, step = (
            (start.checkpoint, start.manifest.step) if start.own and start.manifest else (None, 0)
        )
        data = resume_data(config, sources, checkpoint, step)
        if data.refused:
            return [run_failure("data", data.refused)]
        samplers = [training_sampler(config, sources, data.history)]
        if config.data.validation_sources and config.train.validation_interval:
            samplers.append(open_validation_sampler(config, tokenizer))
        changed = [warning("data", line) for line in data.lines]
        return [*changed, ok("data", "; ".join(map(count_samples, samplers)))]
    except (DataError, OSError) as error:
        return [run_failure("data", str(error))]


def count_samples(sampler: StepSampler) -> str:
    """Count the samples of every source, in one line; reads the first index of each."""
    for number in range(len(sampler.sources)):
        sampler.index(number, 0)
    counts = {source.config.name: int(source.directory.counts.sum()) for source in sampler.sources}
    return ", ".join(f"{name} {count} samples" for name, count in counts.items())


def count_checkpoints(run_dir: Path) -> int:
    """Count the checkpoints of a run; 0 where its directory cannot be read, which the ranks find and report."""
    try:
        return len(checkpoints_of_run(run_dir / "checkpoints"))
    except OSError:
        return 0


def describe_start(start: Start, config: RunConfig) -> str:
    """Describe the origin of the first weights in one line."""
    if start.checkpoint is None or start.manifest is None:
        return f"fresh, seed {config.seed}"
    return f"{start.checkpoint}, {start.manifest.origin} at step {start.manifest.step}"


def needed_paths(config: RunConfig) -> tuple[Path, ...]:
    """Files and directories that must exist on every node."""
    data = config.data
    validation = data.validation_sources if config.train.validation_interval else ()
    paths = [Path(data.root) / source.path for source in (*data.sources, *validation)]
    return (*paths, *(Path(path) for path in (data.tokenizer, config.checkpoint.init_from) if path))
