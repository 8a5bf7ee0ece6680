"""Layer specs of the two towers: Transformer Engine modules, or megatron-core's own with torch or apex norms.

Both families use the same checkpoint keys: a norm in front of a linear layer is stored as that layer's
`layer_norm_weight` and `layer_norm_bias`, as Transformer Engine names it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_qwenvl.engine.backends import LayerBackend


class Norm:
    """Builds torch's LayerNorm or RMSNorm (by `config.normalization`), marked for sequence parallelism.

    megatron-core's own wrapper of the torch norms refuses sequence parallelism; all that it needs is the mark
    that makes the gradients of the replicated weights be summed over the tensor-parallel ranks.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> nn.Module:  # type: ignore[misc]
        kind = nn.LayerNorm if config.normalization == "LayerNorm" else nn.RMSNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class ApexNorm:
    """Builds megatron-core's apex LayerNorm with parameters of the model's type; it makes them fp32."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> nn.Module:  # type: ignore[misc]
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        norm = FusedLayerNorm(config=config, hidden_size=hidden_size, eps=eps).to(config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        built: nn.Module = norm
        return built


class ScaledDotProductAttention(nn.Module):
    """Core attention on torch's `scaled_dot_product_attention`, for unpacked and packed sequences.

    Same constructor and call as megatron-core's DotProductAttention, which refuses packed sequences.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, **_: Any
    ) -> None:
        super().__init__()
        self.causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within each sequence, or within each packed segment.

        Args:
            query: `[s, b, heads, head_dim]`; b is 1 where segments are given.
            key, value: `[s, b, groups, head_dim]`, each shared by `heads / groups` query heads.
            packed_seq_params: its `cu_seqlens_q` are the segment boundaries.

        Returns:
            `[s, b, heads * head_dim]`.
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads or groups, s, head_dim]
        attend = partial(
            F.scaled_dot_product_attention, is_causal=self.causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        if packed_seq_params is None:
            out = attend(q, k, v)
        else:
            bounds = packed_seq_params.cu_seqlens_q.tolist()
            segments = zip(bounds, bounds[1:], strict=False)
            out = torch.cat([attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in segments], dim=2)
        return out.permute(2, 0, 1, 3).flatten(2)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing to save."""
        return {}


def _local_layer(norm: Any, mask: AttnMaskType, qk_norm: Any) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=ScaledDotProductAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _transformer_engine_layer(mask: AttnMaskType, qk_norm: Any) -> ModuleSpec:
    from megatron.core.extensions import transformer_engine as te

    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=te.TELayerNormColumnParallelLinear,
                    core_attention=te.TEDotProductAttention,
                    linear_proj=te.TERowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=te.TELayerNormColumnParallelLinear, linear_fc2=te.TERowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def norm_module(config: TransformerConfig, backend: LayerBackend) -> Any:
    """The class that builds a free-standing norm of a tower on the given layer backend."""
    if backend.name == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return ApexNorm if backend.name == "apex" and config.normalization == "LayerNorm" else Norm


def block_spec(
    config: TransformerConfig, backend: LayerBackend, layers: int, causal: bool
) -> TransformerBlockSubmodules:
    """Spec of `layers` consecutive layers of a tower and of its final norm (built only where the tower ends)."""
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    norm = norm_module(config, backend)
    qk_norm = norm if config.qk_layernorm else IdentityOp
    make_layer = _transformer_engine_layer if backend.name == "te" else partial(_local_layer, norm)
    return TransformerBlockSubmodules(layer_specs=[make_layer(mask, qk_norm)] * layers, layer_norm=norm)
