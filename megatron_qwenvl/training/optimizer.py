"""AdamW with the recipe's parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.engine.optimizer import initialize_moments, set_rates
from megatron_qwenvl.model.build import parameter_keys
from megatron_qwenvl.model.layers import layer_of, vit_depth_from_adapter
from megatron_qwenvl.model.stage import QwenVLStage


def tag_parameters(stage: QwenVLStage, config: RunConfig) -> None:
    """Tag ViT parameters with their global depth below the adapter; must come before wrapping in DDP.

    Names are local to the pipeline stage, so groups are formed by this tag.
    """
    for parameter, key in parameter_keys(stage).items():
        parameter.vit_depth = vit_depth_from_adapter(layer_of(key), config.model)  # type: ignore[attr-defined]


def group_overrides(config: RunConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Build the overrides of parameters that differ from the default.

    - No weight decay for 1-D parameters: biases and norms. Weights, embeddings, the position table and the
      adapter's queries decay.
    - Layer-wise learning rate in the ViT: multiplier `vit_layer_decay ** depth`, depth 0 nearest the adapter;
      the floor of the cosine is multiplied too. megatron-core distinguishes the groups by `lr_mult`; the schedule
      reads `max_lr` and `min_lr`.
    """
    optimizer = config.optimizer
    one_dimensional = ParamPredicate(name="one_dimensional", fn=lambda parameter: parameter.dim() == 1)
    overrides = {ParamKey(predicate=one_dimensional): ParamGroupOverride(wd_mult=0.0)}
    if "vit" in config.train.frozen or optimizer.vit_layer_decay == 1.0:
        return overrides
    for depth in range(1, config.model.vision.layers + 1):
        multiplier = optimizer.vit_layer_decay**depth
        at_depth = ParamPredicate(
            name=f"vit_depth_{depth}", fn=lambda parameter, depth=depth: parameter.vit_depth == depth
        )
        overrides[ParamKey(predicate=at_depth)] = ParamGroupOverride(
            lr_mult=multiplier, max_lr=optimizer.lr * multiplier, min_lr=optimizer.min_lr * multiplier
        )
    return overrides


def build_optimizer(model: DistributedDataParallel, config: RunConfig) -> MegatronOptimizer:
    """Build megatron-core's optimizer of a wrapped pipeline stage: fp32 master weights and moments, or shards."""
    settings = config.optimizer
    bf16 = config.train.precision == "bf16"
    engine_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=settings.sharded,
        clip_grad=config.train.clip_grad,
        log_num_zeros_in_grad=False,
    )
    optimizer = get_megatron_optimizer(engine_config, [model], config_overrides=group_overrides(config))
    initialize_moments(optimizer)
    return optimizer


class Schedule:
    """Learning-rate schedule: linear warm-up from zero, then cosine to the floor; a pure function of the step."""

    def __init__(self, optimizer: MegatronOptimizer, config: RunConfig) -> None:
        settings = config.optimizer
        self._optimizer = optimizer
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=config.train.steps,
            lr_decay_style="cosine",
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def set_step(self, step: int) -> float:
        """Set every group's rate for 0-based `step`; the first step already has 1/warmup of the peak.

        Returns:
            The learning rate of the groups without a multiplier.
        """
        return set_rates(self._optimizer, self._scheduler, step + 1)
