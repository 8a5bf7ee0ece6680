"""Construction of a rank's pipeline stage: modules, freezing, tags that the optimizer reads, initial weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from megatron_qwenvl.config.schema import ModelConfig, RunConfig
from megatron_qwenvl.engine.start import Runtime

from .engine_config import build_engine_configs
from .layers import is_frozen, layer_of
from .partition import Partition
from .stage import QwenVLStage


def build_stage(config: RunConfig, runtime: Runtime, partition: Partition) -> QwenVLStage:
    """Build this rank's pipeline stage on its device, with frozen parts frozen; its weights are uninitialized."""
    configs = build_engine_configs(config, runtime.kernels, runtime.on_gpu)
    with runtime.device:
        stage = QwenVLStage(
            config.model,
            configs,
            partition.stage(runtime.pipeline_rank),
            runtime.kernels,
            runtime.groups,
            trained_before=trains_before(config, partition, runtime.pipeline_rank),
        )
    mark_tensor_parallel(stage)
    freeze(stage, config)
    return stage


def trains_before(config: RunConfig, partition: Partition, stage: int) -> bool:
    """Whether a layer below pipeline stage `stage` has trained parameters."""
    return any(layer.part not in config.train.frozen for layer in partition.layers[: partition.starts[stage]])


def named_tensors(stage: QwenVLStage) -> Iterator[tuple[str, ShardedTensor]]:
    """Checkpoint key and local shard of every parameter; a gated MLP yields its two halves."""
    for entry in stage.sharded_state_dict().values():
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            yield part.key, part


def parameter_keys(stage: QwenVLStage) -> dict[nn.Parameter, str]:
    """Checkpoint key of every parameter of the pipeline stage."""
    keys = {}
    for entry in stage.sharded_state_dict().values():
        keys[entry.data] = entry.key
    return keys


def freeze(stage: QwenVLStage, config: RunConfig) -> None:
    """Turn off gradients of the recipe's frozen parts; must come before wrapping in DDP."""
    for parameter, key in parameter_keys(stage).items():
        parameter.requires_grad_(not is_frozen(key, config.train.frozen))


def mark_tensor_parallel(stage: QwenVLStage) -> None:
    """Mark sharded weights, which the global gradient norm must count on every tensor-parallel rank.

    megatron-core sets the marks while initializing weights, which is left out here.
    """
    for module in stage.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding | RowParallelLinear):
            axis = 1 if isinstance(module, RowParallelLinear) else 0
            if not hasattr(module.weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(module.weight, True, axis, 1)


@torch.no_grad()
def initialize_weights(stage: QwenVLStage, model: ModelConfig, seed: int) -> None:
    """Initialize weights as a function of seed and checkpoint key alone, whatever the parallel layout.

    Linear layers and embeddings are normal with `init_std`, the projections into the residual stream scaled
    down by sqrt(2 x layers) of their tower, adapter queries truncated-normal 0.02, norms 1, biases 0. The patch
    convolution is normal with fan_in^-0.5 and ViT positions with 0.5, so that neither drowns the other in the
    norm that follows.
    """
    for key, shard in named_tensors(stage):
        full = fresh_tensor(key, shard.global_shape, model, seed)
        window = tuple(slice(o, o + n) for o, n in zip(shard.global_offset, shard.local_shape, strict=True))
        shard.data.copy_(full[window])


def fresh_tensor(key: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """Initialize the whole float32 tensor of a checkpoint key; see `initialize_weights`."""
    if key.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    tensor = torch.empty(shape)
    if key == "adapter.query":
        return nn.init.trunc_normal_(tensor, std=0.02, a=-2.0, b=2.0, generator=generator)
    return tensor.normal_(std=_std(key, model), generator=generator)


def _std(key: str, model: ModelConfig) -> float:
    if key == "patch_embed.positional_embedding":
        return 0.5
    if key == "patch_embed.conv1.weight":
        return float((3 * model.vision.patch_size**2) ** -0.5)
    layers = model.vision.layers if layer_of(key).kind == "vit" else model.decoder.layers
    into_residual = key.endswith((".linear_proj.weight", ".linear_fc2.weight")) and "layers." in key
    return model.init_std / (2 * layers) ** 0.5 if into_residual else model.init_std
