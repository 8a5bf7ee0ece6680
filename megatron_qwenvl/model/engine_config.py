"""megatron-core configurations of the two towers and the adapter, derived from the run configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_qwenvl.architecture.model import describe
from megatron_qwenvl.architecture.tower import Tower
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.engine.backends import LayerBackend


@dataclass(frozen=True)
class EngineConfigs:
    """One megatron-core configuration for each part of the model."""

    vit: TransformerConfig
    full_sequence: TransformerConfig
    """Configuration for the adapter and the output layer, which see whole sequences also under sequence parallelism."""
    decoder: TransformerConfig
    """Also the configuration that the pipeline schedule and DDP read."""


def _common(config: RunConfig, backend: LayerBackend, on_gpu: bool) -> dict[str, Any]:
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    recompute: dict[str, Any] = {"recompute_granularity": None}
    if config.train.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif config.train.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {
        "tensor_model_parallel_size": config.parallel.tensor,
        "pipeline_model_parallel_size": config.parallel.pipeline,
        "sequence_parallel": config.parallel.sequence_parallel and config.parallel.tensor > 1,
        "pipeline_dtype": dtype,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "variable_seq_lengths": True,  # micro-batches differ in images, so boundary shapes travel first
        "moe_token_dispatcher_type": "alltoall",  # variable lengths are refused otherwise, also without experts
        "batch_p2p_sync": False,
        "deallocate_pipeline_outputs": on_gpu,
        "calculate_per_token_loss": True,
        "use_cpu_initialization": not on_gpu,
        "perform_initialization": False,  # weights come from `initialize_weights` or a checkpoint
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": on_gpu,
        "apply_rope_fusion": backend.name == "te",
        "attention_softmax_in_fp32": True,
        **recompute,
    }


def build_engine_configs(config: RunConfig, backend: LayerBackend, on_gpu: bool) -> EngineConfigs:
    """Configurations of ViT, adapter and decoder for a run on the given layer backend."""
    architecture, common = describe(config.model), _common(config, backend, on_gpu)
    full_sequence = TransformerConfig(
        num_layers=1,
        hidden_size=architecture.adapter.hidden,
        num_attention_heads=architecture.adapter.heads,
        **{**common, "sequence_parallel": False, "recompute_granularity": None},
    )
    return EngineConfigs(
        vit=_tower_config(architecture.vit, on_gpu, common),
        full_sequence=full_sequence,
        decoder=_tower_config(architecture.decoder, on_gpu, common),
    )


def _tower_config(tower: Tower, on_gpu: bool, common: dict[str, Any]) -> TransformerConfig:
    return TransformerConfig(
        num_layers=tower.layers,
        hidden_size=tower.hidden,
        num_attention_heads=tower.heads,
        num_query_groups=tower.query_groups,
        kv_channels=tower.head_size,
        ffn_hidden_size=tower.ffn_hidden,
        normalization=tower.norm,
        layernorm_epsilon=tower.norm_eps,
        activation_func=F.silu if tower.activation == "silu" else F.gelu,
        gated_linear_unit=tower.gated,
        add_bias_linear=tower.bias,
        add_qkv_bias=tower.qkv_bias,
        qk_layernorm=tower.qk_norm,
        bias_activation_fusion=on_gpu
        and tower.activation == "silu",  # fused bias-GELU is the tanh approximation
        **common,
    )
