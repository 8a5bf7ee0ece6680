"""Checkpoints from stage to stage, weights in and out of published formats, and what is in a checkpoint.

    python tools/convert_checkpoint.py next-stage --from runs/stage1 --to stage2 --out weights/stage2_start
    python tools/convert_checkpoint.py import-parts --vit CLIP-ViT-bigG-14 --llm Qwen-7B --out weights/stage1_start
    python tools/convert_checkpoint.py import-qwenvl --from Qwen-VL-Chat --out weights/qwen_vl_chat
    python tools/convert_checkpoint.py export-qwenvl --from runs/stage3 --out Qwen-VL-mine --tokenizer Qwen-VL
    python tools/convert_checkpoint.py inspect runs/stage2
    python tools/convert_checkpoint.py compare runs/stage3 Qwen-VL-mine
    python tools/convert_checkpoint.py verify runs/stage2

A checkpoint is named by its own directory, a run's checkpoints folder or a run's directory.
Exit codes: 0 done; 1 refused, failed, damaged or different (the reason is printed); 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from megatron_qwenvl.runtime.interrupt import end_at_stop_signals

if __name__ == "__main__":
    end_at_stop_signals("convert_checkpoint")  # before what takes time to import

from megatron_qwenvl.checkpoint.convert.examine import compare, describe, open_weights, table_notes, verify
from megatron_qwenvl.checkpoint.convert.exports import execute_export, plan_export
from megatron_qwenvl.checkpoint.convert.imports import Import, execute_import, plan_parts, plan_qwenvl
from megatron_qwenvl.checkpoint.convert.next_stage import execute_next_stage, plan_transition
from megatron_qwenvl.checkpoint.convert.progress import Progress
from megatron_qwenvl.checkpoint.convert.repeat import Conversion, digest_files, digest_weights, is_done
from megatron_qwenvl.checkpoint.formats.hf_files import content_files
from megatron_qwenvl.checkpoint.storage.files import CheckpointError, OnBytes, check_places
from megatron_qwenvl.checkpoint.storage.manifest import find_checkpoint, read_manifest
from megatron_qwenvl.config.recipes import RECIPES
from megatron_qwenvl.runtime.output import print_any_name

DRY_RUN = (
    "write nothing; check what shows without reading the weights: configuration, sizes of files, names, types and "
    "shapes of all tensors (not their values, and not digests: see verify)"
)


def next_stage(arguments: argparse.Namespace) -> int:
    """Make the start of the next stage from a finished one."""
    plan = plan_transition(arguments.source, arguments.to, arguments.force)
    _tell(plan.notes)
    work = partial(execute_next_stage, plan, arguments.out)
    sources = {"weights": digest_weights(plan.manifest)}
    return _convert(arguments, [plan.source], plan.manifest.total_bytes, work, lambda: sources)


def import_parts(arguments: argparse.Namespace) -> int:
    """Make the start of stage 1 from published ViT and decoder."""
    recipe = RECIPES[arguments.recipe]()
    return _import(arguments, plan_parts(arguments.vit, arguments.llm, recipe, arguments.seed))


def import_qwenvl(arguments: argparse.Namespace) -> int:
    """Make a weights checkpoint of a published Qwen-VL."""
    return _import(arguments, plan_qwenvl(arguments.source, arguments.accept_drift))


def export_qwenvl(arguments: argparse.Namespace) -> int:
    """Write a checkpoint in the published layout."""
    plan = plan_export(arguments.source, arguments.tokenizer)
    _tell(plan.notes)
    work = partial(execute_export, plan, arguments.out)

    def digest() -> dict[str, str]:
        beside = digest_files({file.name: file for file in plan.tokenizer})
        return {"weights": digest_weights(plan.source.manifest), **beside}

    return _convert(arguments, [plan.source.path], plan.total_bytes, work, digest)


def inspect_checkpoint(arguments: argparse.Namespace) -> int:
    """Print what a checkpoint is."""
    _tell(tuple(describe(arguments.checkpoint)))
    return 0


def compare_checkpoints(arguments: argparse.Namespace) -> int:
    """Print the tensors in which two sets of weights differ."""
    a, b = open_weights(arguments.a), open_weights(arguments.b)
    progress = Progress("compare", sum(spec.nbytes for spec in a.specs.values()))
    differences = compare(a, b, arguments.tolerance, progress.add)
    progress.finish()
    _tell([*table_notes(arguments.a), *table_notes(arguments.b), *differences])
    print(f"{len(differences)} of {len(a.specs.keys() | b.specs.keys())} tensors differ")
    return 1 if differences else 0


def verify_checkpoint(arguments: argparse.Namespace) -> int:
    """Print what is wrong with a checkpoint."""
    checkpoint = find_checkpoint(arguments.checkpoint)
    progress = Progress("verify", read_manifest(checkpoint).total_bytes)
    problems = verify(checkpoint, progress.add)
    progress.finish()
    _tell(problems)
    print(f"{checkpoint}: {f'{len(problems)} problems' if problems else 'good'}")
    return 1 if problems else 0


def _import(arguments: argparse.Namespace, plan: Import) -> int:
    _tell(plan.notes)
    work = partial(execute_import, plan, arguments.out)

    def digest() -> dict[str, str]:
        files = {
            f"{number}/{file.name}" if len(plan.sources) > 1 else file.name: file
            for number, source in enumerate(plan.sources, 1)
            for file in content_files(source)
        }
        progress = Progress("digests of the sources", sum(file.stat().st_size for file in files.values()))
        digests = digest_files(files, progress.add)
        progress.finish()
        return digests

    return _convert(arguments, plan.sources, plan.total_bytes, work, digest)


def _convert(
    arguments: argparse.Namespace,
    sources: Iterable[Path],
    total: int,
    work: Callable[[OnBytes, Conversion], None],
    digest: Callable[[], dict[str, str]],
) -> int:
    """Do it, unless it was done before: a requeued job repeats its conversion."""
    apart = ("command", "run", "out", "dry_run")
    settings = {
        name: value
        for name, value in vars(arguments).items()
        if name not in apart and value is not None and not isinstance(value, Path)
    }
    check_places(arguments.out, sources)
    if is_done(arguments.out, arguments.command, settings, digest):
        print(
            f"{arguments.out}: complete, made before by the same command from the same sources; nothing to do"
        )
        return 0
    if arguments.dry_run:
        print(f"would write {total / 1e9:.3f} GB to {arguments.out}")
        return 0
    conversion = Conversion(command=arguments.command, settings=settings, sources=digest())
    progress = Progress(f"{arguments.command} -> {arguments.out}", total)
    work(progress.add, conversion)
    progress.finish()
    return 0


def _tell(lines: list[str] | tuple[str, ...]) -> None:
    for line in lines:
        print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("next-stage", help="weights of a finished stage as the start of the next")
    _add_source(command, "checkpoint or run directory")
    command.add_argument("--to", choices=("stage2", "stage3"), required=True, help="stage to start")
    command.add_argument(
        "--force", action="store_true", help="accept weights of any stage and of unfinished runs"
    )
    _add_output(command, next_stage)

    command = commands.add_parser("import-parts", help="OpenCLIP ViT, Qwen-7B and a new adapter")
    command.add_argument("--vit", type=Path, required=True, help="OpenCLIP weights, file or directory")
    command.add_argument(
        "--llm", type=Path, required=True, help="Hugging Face directory of the language model"
    )
    command.add_argument(
        "--recipe", choices=sorted(RECIPES), default="stage1", help="gives the model's shape"
    )
    command.add_argument("--seed", type=int, default=1234, help="seed of the adapter")
    _add_output(command, import_parts)

    command = commands.add_parser("import-qwenvl", help="a published Qwen-VL or Qwen-VL-Chat directory")
    _add_source(command, "published directory")
    command.add_argument(
        "--accept-drift",
        action="store_true",
        help="take a model whose constant position table was trained, as the published fine-tuning does; the table is "
        "the constant one again",
    )
    _add_output(command, import_qwenvl)

    command = commands.add_parser("export-qwenvl", help="the published layout from a checkpoint")
    _add_source(command, "checkpoint or run directory")
    command.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer file, or published directory whose tokenizer and code files are copied along",
    )
    _add_output(command, export_qwenvl)

    command = commands.add_parser("inspect", help="what a checkpoint is")
    command.add_argument("checkpoint", type=Path)
    command.set_defaults(run=inspect_checkpoint)

    command = commands.add_parser(
        "compare", help="tensors in which two checkpoints or published directories differ"
    )
    command.add_argument("a", type=Path)
    command.add_argument("b", type=Path)
    command.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference that counts as equal"
    )
    command.set_defaults(run=compare_checkpoints)

    command = commands.add_parser("verify", help="whether a checkpoint is whole")
    command.add_argument("checkpoint", type=Path)
    command.set_defaults(run=verify_checkpoint)
    return parser


def _add_source(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--from", dest="source", type=Path, required=True, help=what)


def _add_output(command: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    command.add_argument("--out", type=Path, required=True, help="directory to create")
    command.add_argument("--dry-run", action="store_true", help=DRY_RUN)
    command.set_defaults(run=run)


def main() -> int:
    """Run one command."""
    arguments = _parser().parse_args()
    # torch's memory in huge pages: tensors are read into fresh memory, whose small pages cost more than the reading.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    print_any_name()
    try:
        return arguments.run(arguments)
    except (CheckpointError, OSError) as error:
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
