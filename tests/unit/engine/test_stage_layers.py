"""Contract: a tower's block takes count and numbers of its layers from `StageLayers`."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_qwenvl.engine.stage_layers import StageLayers
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.model.engine_config import build_engine_configs
from megatron_qwenvl.model.specs import block_spec
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.distributed.harness import run_ranks
from tests.distributed.model_cases import small_config


def layers_of_a_stage(process: ProcessInfo) -> tuple[int, int, list[int]]:
    """Count, offset and layer numbers of a block that holds layers 2 and 3 (from 0) of the ViT."""
    config = small_config(pipeline=2)
    runtime = start_engine(config, process)
    vit = build_engine_configs(config, runtime.kernels, runtime.on_gpu).vit
    vit = replace(vit)
    vit.pipeline_model_parallel_layout = StageLayers(offset=2, count=2)
    block = TransformerBlock(
        vit,
        block_spec(vit, runtime.kernels, 2, causal=False),
        post_layer_norm=False,
        pg_collection=runtime.groups,
    )
    numbers = [layer.layer_number for layer in block.layers]
    return get_num_layers_to_build(vit), get_transformer_layer_offset(vit), numbers


def test_count_and_numbers_of_layers_come_from_the_layout_object() -> None:
    assert run_ranks(2, layers_of_a_stage) == [(2, 2, [3, 4])] * 2
