"""The position-aware vision-language adapter (Qwen-VL section 2.1): an image's patches to a fixed number of tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_qwenvl.config.schema import ModelConfig

from .positions import resize_grid, sincos_table


class Adapter(MegatronModule):
    """One cross-attention from learned queries to the patches, then norm and projection; tensor-parallel.

    Projections of queries, keys and values are column-parallel (heads are divided), the output projection is
    row-parallel; `kv_proj` and `proj` are column-parallel with gathered output, because a norm over the full
    width follows or the decoder needs the full width. Constant 2-D sin-cos positions are added to queries and
    keys, not to values.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        hidden, eps = model.decoder.hidden, model.adapter.norm_eps
        kwargs: Any = {"dtype": config.params_dtype}
        self.query_grid = model.adapter.query_grid
        self.heads = model.adapter.heads // config.tensor_model_parallel_size
        parallel: Any = {"config": config, "init_method": config.init_method, "tp_group": groups.tp}
        self.query = nn.Parameter(torch.empty(model.image_tokens, hidden, **kwargs))
        self.kv_proj = ColumnParallelLinear(
            model.vision.width, hidden, bias=False, gather_output=True, **parallel
        )
        self.ln_q = nn.LayerNorm(hidden, eps=eps, **kwargs)
        self.ln_kv = nn.LayerNorm(hidden, eps=eps, **kwargs)
        self.linear_q = ColumnParallelLinear(hidden, hidden, **parallel)
        self.linear_k = ColumnParallelLinear(hidden, hidden, **parallel)
        self.linear_v = ColumnParallelLinear(hidden, hidden, **parallel)
        self.linear_proj = RowParallelLinear(
            hidden, hidden, bias=True, input_is_parallel=True, skip_bias_add=False, **parallel
        )
        self.ln_post = nn.LayerNorm(hidden, eps=eps, **kwargs)
        self.proj = ColumnParallelLinear(hidden, hidden, bias=False, gather_output=True, **parallel)

    def forward(self, patches: Tensor) -> Tensor:
        """Compress images.

        Args:
            patches: `[patches, images, width]`, complete on every tensor-parallel rank.

        Returns:
            `[query_grid^2, images, hidden]`, the same on every tensor-parallel rank.
        """
        images = patches.shape[1]
        grid = round(patches.shape[0] ** 0.5)
        table = sincos_table(self.query_grid, self.query.shape[1]).to(patches.device)
        keys_table = resize_grid(table, grid).to(patches.dtype)[:, None, :]
        kv = self.ln_kv(self.kv_proj(patches)[0])
        query = self.ln_q(self.query) + table.to(patches.dtype)
        q = self.linear_q(query[:, None, :])[0].expand(-1, images, -1)
        k = self.linear_k(kv + keys_table)[0]
        v = self.linear_v(kv)[0]
        q, k, v = (self._split_heads(x) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # [images, heads, queries, head_dim]
        mixed = mixed.permute(2, 0, 1, 3).flatten(2).contiguous()
        out = self.ln_post(self.linear_proj(mixed)[0])
        projected: Tensor = self.proj(out)[0]
        return projected.contiguous()

    def _split_heads(self, x: Tensor) -> Tensor:
        """`[s, images, heads * head_dim]` to `[images, heads, s, head_dim]`."""
        split: Tensor = x.unflatten(2, (self.heads, -1))
        return split.permute(1, 2, 0, 3)
