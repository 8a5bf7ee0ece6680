"""Commands of `convert_checkpoint`: plan a conversion, check its directories, execute it with a progress line."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from megatron_qwenvl.checkpoint.convert.compare import compare, open_weights, table_notes
from megatron_qwenvl.checkpoint.convert.exports import execute_export, plan_export
from megatron_qwenvl.checkpoint.convert.imports import Import, execute_import, plan_parts, plan_qwenvl
from megatron_qwenvl.checkpoint.convert.inspect import describe_checkpoint, verify
from megatron_qwenvl.checkpoint.convert.next_stage import execute_next_stage, plan_transition
from megatron_qwenvl.checkpoint.convert.progress_line import ProgressLine
from megatron_qwenvl.checkpoint.convert.record import Conversion, digest_files, digest_weights, is_done
from megatron_qwenvl.checkpoint.formats.hf_files import content_files
from megatron_qwenvl.checkpoint.storage.file_checks import OnBytes
from megatron_qwenvl.checkpoint.storage.manifest import read_manifest
from megatron_qwenvl.checkpoint.storage.new_directory import check_places
from megatron_qwenvl.checkpoint.storage.run_folder import find_checkpoint
from megatron_qwenvl.config.load import load_config
from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.runtime.exit_codes import RUN_ERROR, SUCCESS


def next_stage(arguments: argparse.Namespace) -> int:
    """Make the initial weights of the next training stage from a finished one."""
    plan = plan_transition(arguments.source, arguments.to, arguments.force)
    _print_lines(plan.notes)
    work = partial(execute_next_stage, plan, arguments.out)
    sources = {"weights": digest_weights(plan.manifest)}
    return _convert(arguments, [plan.source], plan.manifest.total_bytes, work, lambda: sources)


def import_parts(arguments: argparse.Namespace) -> int:
    """Make the initial weights of stage 1 from a published ViT and decoder."""
    config = load_config(arguments.recipe)
    digests = {} if arguments.recipe in RECIPES else {"recipe": _digest_model(config)}
    return _import(arguments, plan_parts(arguments.vit, arguments.llm, config, arguments.seed), digests)


def import_qwenvl(arguments: argparse.Namespace) -> int:
    """Make a weights checkpoint of a published Qwen-VL."""
    return _import(arguments, plan_qwenvl(arguments.source, arguments.accept_drift))


def export_qwenvl(arguments: argparse.Namespace) -> int:
    """Write a checkpoint in the Hugging Face format."""
    plan = plan_export(arguments.source, arguments.tokenizer)
    _print_lines(plan.notes)
    work = partial(execute_export, plan, arguments.out)

    def digest() -> dict[str, str]:
        beside = digest_files({file.name: file for file in plan.tokenizer})
        return {"weights": digest_weights(plan.source.manifest), **beside}

    return _convert(arguments, [plan.source.path], plan.total_bytes, work, digest)


def inspect_checkpoint(arguments: argparse.Namespace) -> int:
    """Print a description of a checkpoint."""
    _print_lines(tuple(describe_checkpoint(arguments.checkpoint)))
    return SUCCESS


def compare_checkpoints(arguments: argparse.Namespace) -> int:
    """Print the tensors in which two sets of weights differ."""
    a, b = open_weights(arguments.a), open_weights(arguments.b)
    progress = ProgressLine("compare", sum(spec.nbytes for spec in a.specs.values()))
    differences = compare(a, b, arguments.tolerance, progress.add)
    progress.finish()
    _print_lines([*table_notes(arguments.a), *table_notes(arguments.b), *differences])
    print(f"{len(differences)} of {len(a.specs.keys() | b.specs.keys())} tensors differ")
    return RUN_ERROR if differences else SUCCESS


def verify_checkpoint(arguments: argparse.Namespace) -> int:
    """Print the damage of a checkpoint."""
    checkpoint = find_checkpoint(arguments.checkpoint)
    progress = ProgressLine("verify", read_manifest(checkpoint).total_bytes)
    problems = verify(checkpoint, progress.add)
    progress.finish()
    _print_lines(problems)
    print(f"{checkpoint}: {f'{len(problems)} problems' if problems else 'good'}")
    return RUN_ERROR if problems else SUCCESS


def _digest_model(config: RunConfig) -> str:
    """Digest the model of a recipe's file, which may be edited between two runs of a command."""
    return hashlib.sha256(config.model.model_dump_json().encode()).hexdigest()


def _import(arguments: argparse.Namespace, plan: Import, digests: Mapping[str, str] | None = None) -> int:
    _print_lines(plan.notes)
    work = partial(execute_import, plan, arguments.out)

    def digest() -> dict[str, str]:
        files = {
            f"{number}/{file.name}" if len(plan.sources) > 1 else file.name: file
            for number, source in enumerate(plan.sources, 1)
            for file in content_files(source)
        }
        progress = ProgressLine("digests of the sources", sum(file.stat().st_size for file in files.values()))
        found = digest_files(files, progress.add)
        progress.finish()
        return {**found, **(digests or {})}

    return _convert(arguments, plan.sources, plan.total_bytes, work, digest)


def _convert(
    arguments: argparse.Namespace,
    sources: Iterable[Path],
    total: int,
    work: Callable[[OnBytes, Conversion], None],
    digest: Callable[[], dict[str, str]],
) -> int:
    """Execute a conversion, unless it was completed before: a requeued job repeats its conversion."""
    not_settings = ("command", "out", "dry_run")
    settings = {
        name: value
        for name, value in vars(arguments).items()
        if name not in not_settings and value is not None and not isinstance(value, Path)
    }
    check_places(arguments.out, sources)
    if is_done(arguments.out, arguments.command, settings, digest):
        print(
            f"{arguments.out}: complete, made before by the same command from the same sources; nothing to do"
        )
        return SUCCESS
    if arguments.dry_run:
        print(f"would write {total / 1e9:.3f} GB to {arguments.out}")
        return SUCCESS
    conversion = Conversion(command=arguments.command, settings=settings, sources=digest())
    progress = ProgressLine(f"{arguments.command} -> {arguments.out}", total)
    work(progress.add, conversion)
    progress.finish()
    return SUCCESS


def _print_lines(lines: list[str] | tuple[str, ...]) -> None:
    for line in lines:
        print(line)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "next-stage": next_stage,
    "import-parts": import_parts,
    "import-qwenvl": import_qwenvl,
    "export-qwenvl": export_qwenvl,
    "inspect": inspect_checkpoint,
    "compare": compare_checkpoints,
    "verify": verify_checkpoint,
}
"""Function of each command; returns the exit code."""
