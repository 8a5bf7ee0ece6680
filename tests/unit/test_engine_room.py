"""Outside of `engine/`, of megatron-core and torch's distributed parts only what is listed here is used.

What is listed is documented interface of both tested versions of megatron-core. Whatever is private to it, or differs
between versions, is a touch point: a module of `engine/` that says what it relies on, with a contract test in
`tests/unit/engine/`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_architecture import PACKAGE, imported_modules, plant

CORE = "megatron.core"
ENGINE_MODULES = (CORE, "torch.distributed")

ALLOWED: dict[str, str] = {
    # model/: the layers of the two towers are megatron-core's
    f"{CORE}.transformer.transformer_config.TransformerConfig": "configuration of every module",
    f"{CORE}.transformer.module.MegatronModule": "base of our modules",
    f"{CORE}.transformer.transformer_block.TransformerBlock": "the layers of a tower on a pipeline stage",
    f"{CORE}.transformer.transformer_block.TransformerBlockSubmodules": "layer specs",
    f"{CORE}.transformer.transformer_layer.TransformerLayer": "layer specs",
    f"{CORE}.transformer.transformer_layer.TransformerLayerSubmodules": "layer specs",
    f"{CORE}.transformer.attention.SelfAttention": "layer specs",
    f"{CORE}.transformer.attention.SelfAttentionSubmodules": "layer specs",
    f"{CORE}.transformer.mlp.MLP": "layer specs",
    f"{CORE}.transformer.mlp.MLPSubmodules": "layer specs",
    f"{CORE}.transformer.spec_utils.ModuleSpec": "layer specs",
    f"{CORE}.transformer.identity_op.IdentityOp": "layer specs",
    f"{CORE}.transformer.enums.AttnMaskType": "layer specs",
    f"{CORE}.transformer.enums.ModelType": "asked for by the pipeline schedule",
    f"{CORE}.fusions.fused_bias_dropout.get_bias_dropout_add": "layer specs",
    f"{CORE}.fusions.fused_layer_norm.FusedLayerNorm": "the norm of the apex backend",
    f"{CORE}.extensions.transformer_engine": "the layers of the Transformer Engine backend",
    f"{CORE}.extensions.transformer_engine.TENorm": "the norm of the Transformer Engine backend",
    f"{CORE}.packed_seq_params.PackedSeqParams": "bounds of packed sequences, as attention takes them",
    f"{CORE}.process_groups_config.ProcessGroupCollection": "process groups, handed to modules",
    f"{CORE}.tensor_parallel.ColumnParallelLinear": "tensor-parallel layers",
    f"{CORE}.tensor_parallel.RowParallelLinear": "tensor-parallel layers",
    f"{CORE}.tensor_parallel.VocabParallelEmbedding": "tensor-parallel layers",
    f"{CORE}.tensor_parallel.layers.set_tensor_model_parallel_attributes": "marks sharded weights",
    f"{CORE}.tensor_parallel.gather_from_sequence_parallel_region": "sequence parallelism",
    f"{CORE}.tensor_parallel.scatter_to_sequence_parallel_region": "sequence parallelism",
    f"{CORE}.tensor_parallel.mappings.scatter_to_sequence_parallel_region": "sequence parallelism",
    f"{CORE}.tensor_parallel.vocab_parallel_cross_entropy": "the loss",
    f"{CORE}.utils.make_viewless_tensor": "boundary tensors must not be views",
    f"{CORE}.dist_checkpointing.mapping.ShardedTensor": "a parameter's place in the full tensor",
    f"{CORE}.dist_checkpointing.mapping.ShardedTensorFactory": "the two halves of a gated MLP",
    # training/
    f"{CORE}.distributed.DistributedDataParallel": "gradients of data parallelism",
    f"{CORE}.distributed.DistributedDataParallelConfig": "its configuration",
    f"{CORE}.distributed.finalize_model_grads": "reduces gradients; named in the configuration",
    f"{CORE}.pipeline_parallel.get_forward_backward_func": "the pipeline schedule",
    f"{CORE}.optimizer.MegatronOptimizer": "type of the optimizer",
    f"{CORE}.optimizer.OptimizerConfig": "configuration of the optimizer",
    f"{CORE}.optimizer.ParamGroupOverride": "parameter groups",
    f"{CORE}.optimizer.ParamKey": "parameter groups",
    f"{CORE}.optimizer.optimizer_config.ParamPredicate": "parameter groups",
    f"{CORE}.optimizer.get_megatron_optimizer": "builds the optimizer",
    f"{CORE}.optimizer_param_scheduler.OptimizerParamScheduler": "learning-rate schedule",
    # launchers
    "torch.distributed.run.main": "torchrun itself, which runtime/torchrun.py wraps",
    "torch.distributed.elastic.multiprocessing.api.SignalException": "how torchrun says that it was stopped",
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError": "how torchrun says that a process failed",
}
"""Names that any room may import, and what for."""

COLLECTIVES = ("checkpoint/run/ranks.py", "preflight/")
"""Who may call `torch.distributed`, in groups of their own: the exchange of checkpoints, and checks before a run."""

PRIVATE = {
    "os._exit": "ends a process at once; of the standard library",
    "forkserver._forkserver": "of the standard library",
    "forkserver._forkserver._forkserver_address": "of the standard library",
    "util._exit_function": "of the standard library",
    "request._receive": "of the module's own class",
}
"""Underscore attributes that are read of something else than `self`, outside of `engine/`."""


def engine_violations(path: Path, root: Path) -> Iterator[str]:
    """Imports that are not on the list, and private attributes of anything."""
    relative = path.relative_to(root).as_posix()
    if relative.startswith("engine/"):
        return
    tree = ast.parse(path.read_text())
    for line, module in imported_modules(tree, PACKAGE):
        if module == "torch.distributed" and relative.startswith(COLLECTIVES):
            continue
        if f"{module}.".startswith(tuple(f"{name}." for name in ENGINE_MODULES)) and module not in ALLOWED:
            yield f"{relative}:{line}: {module} is not on the list; it belongs into engine/"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        name = ast.unparse(node)
        if name.startswith("torch.distributed."):
            yield f"{relative}:{node.lineno}: {name} belongs into engine/"
        own = ast.unparse(node.value) in ("self", "cls", "super()")
        if node.attr.startswith("_") and not node.attr.startswith("__") and not own and name not in PRIVATE:
            yield f"{relative}:{node.lineno}: {name} is private to its owner"


def violations(root: Path) -> list[str]:
    return [line for path in sorted(root.rglob("*.py")) for line in engine_violations(path, root)]


ROOT = Path(__file__).parents[2] / PACKAGE


def test_only_what_is_listed_is_used_of_the_engine() -> None:
    assert violations(ROOT) == []


def test_every_listed_name_is_used() -> None:
    trees = [
        ast.parse(path.read_text())
        for path in ROOT.rglob("*.py")
        if not path.relative_to(ROOT).as_posix().startswith("engine/")
    ]
    used = {module for tree in trees for _, module in imported_modules(tree, PACKAGE)}
    assert ALLOWED.keys() - used == set()


def test_every_touch_point_says_what_it_relies_on_and_names_its_contract_test() -> None:
    """The modules of `engine/` that import megatron-core or torch's distributed parts."""
    silent = []
    for path in sorted((ROOT / "engine").glob("*.py")):
        tree = ast.parse(path.read_text())
        touches = any(module.startswith(ENGINE_MODULES) for _, module in imported_modules(tree, PACKAGE))
        docstring = ast.get_docstring(tree) or ""
        tests = [word.strip("`.,;()") for word in docstring.split() if "tests/unit/engine/" in word]
        there = all((ROOT.parent / test).is_file() for test in tests)
        if touches and ("Relies on" not in docstring or not tests or not there):
            silent.append(path.name)
    assert silent == []


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        (
            "training/step.py",
            "from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32",
            "clip_grad_by_total_norm_fp32 is not on the list",
        ),
        ("training/step.py", "from megatron.core import parallel_state", "parallel_state is not on the list"),
        ("model/stage.py", "import megatron.core", "megatron.core is not on the list"),
        (
            "checkpoint/formats/files.py",
            "from torch.distributed.checkpoint.filesystem import _StorageInfo",
            "_StorageInfo is not on the list",
        ),
        ("training/loop.py", "import torch.distributed as dist", "torch.distributed is not on the list"),
        ("model/stage.py", "import torch\ntorch.distributed.barrier()", "barrier belongs into engine/"),
        ("checkpoint/run/ranks.py", "from torch.distributed import checkpoint", "is not on the list"),
        ("training/step.py", "communicator._communicate(None)", "communicator._communicate is private"),
        ("training/optimizer.py", "optimizer.chained_optimizers[0]._state", "._state is private"),
    ],
)
def test_a_planted_violation_is_named(tmp_path: Path, file: str, source: str, found: str) -> None:
    plant(tmp_path, file, source)
    assert found in "\n".join(violations(tmp_path))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("engine/optimizer.py", "from megatron.core import parallel_state\nx._private"),
        ("checkpoint/run/ranks.py", "import torch.distributed as dist\ndist.barrier()"),
        ("training/step.py", "from megatron.core.distributed import finalize_model_grads\nself._private"),
        ("training/step.py", "x.__dict__"),
    ],
)
def test_what_is_allowed_is_not_named(tmp_path: Path, file: str, source: str) -> None:
    plant(tmp_path, file, source)
    assert violations(tmp_path) == []
