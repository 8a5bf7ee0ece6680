"""The model as one pipeline stage: any contiguous slice of ViT, adapter and decoder."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from megatron_qwenvl.architecture.model import describe
from megatron_qwenvl.batch import Batch
from megatron_qwenvl.config.schema import ModelConfig
from megatron_qwenvl.engine.backends import LayerBackend
from megatron_qwenvl.engine.stage_layers import StageLayers

from .adapter import Adapter
from .engine_config import EngineConfigs
from .layers import Layer, LayerKind
from .long_context import ContextExtension, Segments, scale_queries
from .patch_embedding import PatchEmbedding
from .positions import rotary_frequencies
from .specs import block_spec


class WordEmbedding(MegatronModule):
    """Vocabulary-parallel word embedding with the images' features put into their slots."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.word_embeddings = VocabParallelEmbedding(
            model.decoder.vocab_size,
            model.decoder.hidden,
            init_method=config.init_method,
            config=config,
            tp_group=groups.tp,
        )

    def forward(self, tokens: Tensor, features: Tensor | None, image_starts: Tensor) -> Tensor:
        """Embed tokens and overwrite every image's slots.

        Args:
            tokens: `[T]`.
            features: `[slots, images, hidden]`, or None without images.
            image_starts: `[images]`, first slot of each image.

        Returns:
            `[T, 1, hidden]`, the same on every tensor-parallel rank.
        """
        x: Tensor = self.word_embeddings(tokens[None])[0]  # [T, hidden]
        if features is not None:
            slots = image_starts[:, None] + torch.arange(features.shape[0], device=tokens.device)
            x = x.index_copy(0, slots.flatten(), features.transpose(0, 1).flatten(0, 1).to(x.dtype))
        return x[:, None, :]


class QwenVLStage(MegatronModule):
    """A contiguous slice of the layer list, run by megatron-core's pipeline schedules.

    Between pipeline stages travels one 3-D tensor: `[patches, images, width]` inside the ViT, `[slots, images, hidden]`
    after the adapter, `[T, 1, hidden]` inside the decoder; the first and the last divided by the tensor-parallel
    size under sequence parallelism. A micro-batch without images sends `[1, 1, 1]` zeros through the vision
    layers instead, connected to their parameters so that every expected gradient message and bucket fires.

    Args:
        layers: this pipeline stage's slice of `list_layers(model)`.
        trained_before: whether a parameter on an earlier pipeline stage is trained; if not, the received tensor is
            detached and no gradient is sent back.
    """

    def __init__(
        self,
        model: ModelConfig,
        configs: EngineConfigs,
        layers: tuple[Layer, ...],
        backend: LayerBackend,
        groups: ProcessGroupCollection,
        trained_before: bool = True,
    ) -> None:
        super().__init__(config=configs.decoder)
        self.model = model
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.trained_before = trained_before
        self.input_tensor: Tensor | None = None
        self._groups, self._backend = groups, backend
        kinds = {layer.kind for layer in layers}
        self.pre_process = "patch_embed" in kinds
        self.post_process = "head" in kinds
        self.vision_sequence_parallel = configs.vit.sequence_parallel
        self.patch_embed = PatchEmbedding(configs.vit, model.vision) if self.pre_process else None
        self.vit = self._block(configs.vit, layers, "vit", causal=False, ends_here=False)
        self.adapter = Adapter(configs.full_sequence, model, groups) if "adapter" in kinds else None
        self.embedding = WordEmbedding(configs.decoder, model, groups) if "embedding" in kinds else None
        self.decoder = self._block(
            configs.decoder, layers, "decoder", causal=True, ends_here=self.post_process
        )
        self.output_layer = self._head(configs.full_sequence) if self.post_process else None

    def _block(
        self,
        config: TransformerConfig,
        layers: tuple[Layer, ...],
        kind: LayerKind,
        causal: bool,
        ends_here: bool,
    ) -> TransformerBlock | None:
        own = [layer.index for layer in layers if layer.kind == kind]
        if not own and not ends_here:
            return None
        config.pipeline_model_parallel_layout = StageLayers(own[0] if own else config.num_layers, len(own))
        block = TransformerBlock(
            config,
            block_spec(config, self._backend, len(own), causal),
            post_layer_norm=ends_here,
            pre_process=True,
            post_process=ends_here,
            pg_collection=self._groups,
        )
        if causal:
            for layer in block.layers:
                layer.self_attention.core_attention.register_forward_pre_hook(scale_queries, with_kwargs=True)
        return block

    def _head(self, config: TransformerConfig) -> ColumnParallelLinear:
        decoder = self.model.decoder
        return ColumnParallelLinear(
            decoder.hidden,
            decoder.vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self._groups.tp,
        )

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Take the tensor received from the previous pipeline stage; called by the schedule."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if received is not None and not self.trained_before:
            received = received.detach()
        self.input_tensor = received

    def forward(
        self,
        batch: Batch,
        positions: Tensor | None = None,
        features: Tensor | None = None,
        extension: ContextExtension | None = None,
    ) -> Tensor:
        """Run the layers of this pipeline stage.

        Args:
            batch: the micro-batch on the device.
            positions: int64 `[m]`, the decoder positions whose losses or logits are wanted; read by the last
                pipeline stage only.
            features: the adapter's output for the batch's images from an earlier `encode_images`, in place of running
                the vision layers.
            extension: scales positions beyond the trained length, at inference; None: they are as any other.

        Returns:
            The boundary tensor; on the last pipeline stage float32 `[m]` losses of `batch.labels` at `positions`, or,
            for a batch without labels, logits `[m, vocab / tensor-parallel size]`.
        """
        x = features if features is not None else self._vision(batch, self.input_tensor)
        if self.embedding is not None:
            x = self._embed_tokens(self.embedding, batch, x)
        assert x is not None, "only the first pipeline stage receives nothing"
        if self.decoder is not None:
            x = self._decode(self.decoder, batch, x, extension)
        if self.output_layer is not None:
            assert positions is not None, "the last pipeline stage is told which positions are wanted"
            return self._predict(self.output_layer, batch, x, positions)
        out: Tensor = make_viewless_tensor(x.contiguous(), requires_grad=x.requires_grad, keep_graph=True)
        return out

    def _vision(self, batch: Batch, x: Tensor | None) -> Tensor | None:
        if self.patch_embed is None and self.vit is None and self.adapter is None:
            return x
        return self.encode_images(batch, x) if batch.num_images else self._without_images(x)

    def encode_images(self, batch: Batch, x: Tensor | None = None) -> Tensor:
        """Run this pipeline stage's vision layers on the batch's pixels or on the output of the one before."""
        if self.patch_embed is not None:
            x = self.patch_embed(batch.pixels)
        assert x is not None, "vision layers without pixels follow another pipeline stage"
        if self.vit is not None:
            x = self.vit(_ready_for_recompute(x, self.vit), attention_mask=None)
        if self.adapter is not None:
            if self.vision_sequence_parallel:
                # Every rank computes on all patches, so gradients are already complete on each of them.
                x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
            x = self.adapter(x)
        return x

    def _without_images(self, x: Tensor | None) -> Tensor:
        """Zeros that depend on the received tensor and on every trained vision parameter of this pipeline stage."""
        reference = next(self.parameters())
        nothing = torch.zeros(1, 1, 1, dtype=self.config.params_dtype, device=reference.device)
        if x is not None:
            nothing = nothing + 0.0 * x.sum()
        for module in (self.patch_embed, self.vit, self.adapter):
            for parameter in module.parameters() if module is not None else ():
                if parameter.requires_grad:
                    nothing = nothing + 0.0 * parameter.sum()
        return nothing

    def _embed_tokens(self, embedding: WordEmbedding, batch: Batch, x: Tensor | None) -> Tensor:
        features = x if batch.num_images else None
        out = embedding(batch.tokens, features, batch.image_starts)
        if features is None and x is not None:
            out = out + 0.0 * x.sum()
        own: Tensor = scatter_to_sequence_parallel_region(out) if self.config.sequence_parallel else out
        return own

    def _decode(
        self, decoder: TransformerBlock, batch: Batch, x: Tensor, extension: ContextExtension | None
    ) -> Tensor:
        packed, rotary = self._attention_inputs(batch, extension)
        out: Tensor = decoder(
            _ready_for_recompute(x, decoder),
            attention_mask=None,
            rotary_pos_emb=rotary,
            packed_seq_params=packed,
        )
        return out

    def _attention_inputs(
        self, batch: Batch, extension: ContextExtension | None = None
    ) -> tuple[Segments, Tensor]:
        """Segments and rotary angles in the form that the layer backend needs.

        Transformer Engine's fused kernels restart positions at every segment by themselves. The local attention
        takes one angle per token; it is given the plain sequence layout so that megatron-core does not split
        the sequence once more for the rotary embedding.
        """
        tower = describe(self.model).decoder
        assert tower.rotary_base is not None, "every decoder family so far has rotary positions"
        head_dim, base = tower.head_size, float(tower.rotary_base)
        fused = self._backend.name == "te"
        positions = (
            torch.arange(batch.length, device=batch.position_ids.device) if fused else batch.position_ids
        )
        longest = batch.max_segment
        packed = Segments(
            qkv_format="thd" if fused else "sbhd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        if extension is not None:
            base = extension.rotary_base(base, head_dim)
            packed.query_scale = extension.query_scale(batch.position_ids)
        return packed, rotary_frequencies(positions, head_dim, base)

    def _predict(self, head: ColumnParallelLinear, batch: Batch, x: Tensor, positions: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
        logits: Tensor = head(x.index_select(0, positions))[0]  # [m, 1, vocab / tp]
        if batch.labels is None:
            return logits[:, 0]
        labels = batch.labels.index_select(0, positions)[:, None]
        losses: Tensor = vocab_parallel_cross_entropy(logits.float(), labels)
        return losses[:, 0]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded tensors under layout-independent keys: one per layer, numbered over the whole tower."""
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}  # any partition reads any other's
        tensors = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # Linear layers offer an extra state for fp8 scaling; there is none here.
        return {key: value for key, value in tensors.items() if not key.endswith("_extra_state")}


def _ready_for_recompute(x: Tensor, block: nn.Module) -> Tensor:
    """Recomputation drops the gradients of trained parameters when its input needs none; make it need one."""
    if torch.is_grad_enabled() and not x.requires_grad and any(p.requires_grad for p in block.parameters()):
        return x.detach().requires_grad_()
    return x
