"""Which layers of a tower a pipeline stage holds, in place of megatron-core's own pipeline layout.

Relies on: `TransformerBlock` and `TransformerLayer` take the number of layers to build and the offset of their layer
numbers from `config.pipeline_model_parallel_layout`, if there is one, by the two methods below. The built-in layout
knows decoder layers only and refuses those of an encoder. Held by `tests/unit/engine/test_stage_layers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.enums import LayerType


@dataclass(frozen=True)
class StageLayers:
    """The consecutive layers of one tower that a pipeline stage holds.

    Args:
        offset: layers of the tower on earlier pipeline stages.
        count: layers of the tower on this pipeline stage.
    """

    offset: int
    count: int

    def get_layer_offset(self, layer_type: LayerType | None = None, vp_stage: int | None = None) -> int:
        """Layers of the tower on earlier pipeline stages."""
        return self.offset

    def get_num_layers_to_build(
        self, layer_type: LayerType | None = None, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        """Layers of the tower on this pipeline stage."""
        return self.count
