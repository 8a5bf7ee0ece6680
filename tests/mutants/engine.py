"""Faults of the touch points with megatron-core and torch, and the contract tests that notice them."""

from __future__ import annotations

from .mutant import PACKAGE, Mutant

ENGINE = f"{PACKAGE}/engine"


def _contract(name: str, module: str, old: str, new: str, test: str | None = None) -> Mutant:
    """A fault of one module, noticed by its contract test."""
    return Mutant(
        f"engine: {name}", f"{ENGINE}/{module}.py", old, new, (f"tests/unit/engine/test_{test or module}.py",)
    )


TOUCH_POINTS = [
    _contract(
        "gradients are sent below a frozen prefix",
        "communicator",
        "if not self._trained_before:",
        "if False:",
    ),
    _contract("layers are numbered from 1 on every stage", "stage_layers", "return self.offset", "return 0"),
    _contract("moments are not made", "optimizer", "part.init_state_fn(part.optimizer, part.config)", "pass"),
    _contract(
        "the schedule counts on from where it was",
        "optimizer",
        "scheduler.num_steps = steps\n    scheduler.step(0)",
        "scheduler.step(steps)",
    ),
    _contract(
        "settings of a group come from the checkpoint",
        "optimizer",
        'state["param_groups"] = [{**group, "step": saved[0]["step"]} for group in groups]',
        "pass",
    ),
    _contract(
        "the sharded optimizer takes another Adam",
        "adamw",
        '_INSTALLED.replace(distrib_optimizer, "Adam", adam)',
        "pass",
    ),
    _contract("Adam stays replaced", "adamw", "_INSTALLED.restore()", "pass"),
    _contract("torch stays adapted", "cpu_adapter", "_ADAPTED.restore()", "pass"),
    _contract("the engine is not put back", "start", "    restore_engine()\n", ""),
    _contract(
        "nobody checks that shards cover the tensors",
        "checkpoint_state",
        "validate_sharding_integrity(described)",
        "pass",
    ),
    _contract(
        "every replica is stored",
        "checkpoint_state",
        "keep_only_main_replica=True",
        "keep_only_main_replica=False",
    ),
    _contract(
        "a snapshot shares memory with training",
        "checkpoint_state",
        "return host.clone() if shared and always",
        "return host if shared and always",
    ),
    _contract(
        "chunks repeat the first one",
        "checkpoint_tensors",
        "narrow(axis, number * size, size)",
        "narrow(axis, 0, size)",
        "checkpoint_files",
    ),
    _contract(
        "the mark names another format",
        "checkpoint_index",
        '"sharded_backend_version": 1,',
        '"sharded_backend_version": 2,',
        "checkpoint_files",
    ),
    _contract(
        "tensors are read without patience",
        "checkpoint_reads",
        '(filesystem.FileSystem, "create_stream", _create_stream),',
        "",
    ),
]
