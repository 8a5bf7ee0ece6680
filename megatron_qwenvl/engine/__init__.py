"""The engine room: everything that touches private or version-dependent parts of megatron-core and torch.

- `versions` the tested versions and the guard; `start` process groups and devices of a run
- `cpu_adapter`, `adamw` what megatron-core needs on a CPU; `backends` which kernels compute;
  `replacements` names of the engine that are replaced and put back
- `stage_layers`, `communicator`, `optimizer` the parts of pipeline and optimizer that training drives itself
- `checkpoint_state` a rank's sharded state, `checkpoint_reads` patience while the engine reads, `checkpoint_index`,
  `checkpoint_items`, `checkpoint_tensors` the files of a distributed checkpoint

Each module that relies on more than documented interface says on what, and names the contract test that fails when a
new version changes it. `docs/engine.md` has them in one table.
"""
