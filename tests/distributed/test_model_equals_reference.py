"""The engine's model against the plain PyTorch rendering of the published formulas, and greedy decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_qwenvl.batch import Batch
from megatron_qwenvl.checkpoint.formats.names import TABLE_NAME, qwenvl_rules
from megatron_qwenvl.config.schema import RunConfig, RuntimeConfig
from megatron_qwenvl.data.rendering.tokenizer import load_tokenizer
from megatron_qwenvl.engine.start import start_engine
from megatron_qwenvl.inference.generate import Generator, Prompt
from megatron_qwenvl.model.build import build_stage, initialize_weights, named_tensors
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.model.stage import QwenVLStage
from megatron_qwenvl.runtime.processes import ProcessInfo
from tests.reference_model import ReferenceModel

from .harness import run_ranks
from .model_cases import SMALL, make_batch, small_config


def build_both(process: ProcessInfo, config: RunConfig) -> tuple[QwenVLStage, ReferenceModel]:
    """Our model and the reference with the same random weights, biases and norms included."""
    runtime = start_engine(config, process)
    stage = build_stage(config, runtime, make_partition(config, 1))
    initialize_weights(stage, config.model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in stage.parameters():
        if parameter.dim() == 1:  # else a swapped norm or a lost bias would not show
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    reference = ReferenceModel(config.model)
    reference.load_state_dict(published_tensors(stage, config), strict=True)
    return stage.eval(), reference.eval()


def published_tensors(stage: QwenVLStage, config: RunConfig) -> dict[str, Tensor]:
    halves: dict[str, list[Tensor]] = {}
    for key, shard in named_tensors(stage):
        halves.setdefault(key, []).append(shard.data.detach())
    ours = {key: torch.cat(parts) if len(parts) > 1 else parts[0] for key, parts in halves.items()}
    theirs = {}
    for rule in qwenvl_rules(config.model):
        values = rule.mapping.to_hf([ours[name] for name in rule.megatron])
        theirs.update(zip(rule.hf, values, strict=True))
    theirs[TABLE_NAME] = ReferenceModel(config.model).state_dict()[TABLE_NAME]
    return theirs


def segment_ids(batch: Batch) -> Tensor:
    return torch.bucketize(torch.arange(batch.length), batch.cu_seqlens[1:].long(), right=True)


@torch.no_grad()
def logits_of_both(
    process: ProcessInfo, config: RunConfig, images: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    stage, reference = build_both(process, config)
    batch = make_batch(3, images, config)
    if interleaved:
        batch.cu_seqlens = torch.tensor([0, batch.length], dtype=torch.int32)
        batch.position_ids = torch.arange(batch.length)
    batch.labels = None
    ours = stage(batch, torch.arange(batch.length))
    starts = [(0, int(start)) for start in batch.image_starts]
    theirs = reference(
        batch.tokens[None], batch.pixels, starts, batch.position_ids[None], segment_ids(batch)[None]
    )
    return ours, theirs[0]


@pytest.mark.parametrize("interleaved", [False, True], ids=["isolated", "interleaved"])
@pytest.mark.parametrize(("image_size", "images"), [(56, 3), (112, 2), (56, 0)])
def test_logits_equal_the_reference(image_size: int, images: int, interleaved: bool) -> None:
    """Base resolution, doubled resolution (interpolated positions), and text alone."""
    ((ours, theirs),) = run_ranks(1, logits_of_both, small_config(image_size=image_size), images, interleaved)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def losses_packed_and_alone(process: ProcessInfo, config: RunConfig) -> tuple[Tensor, Tensor]:
    """Losses of every position of a pack, and of its samples run one at a time."""
    stage, _ = build_both(process, config)
    batch = make_batch(5, 3, config)
    bounds = batch.cu_seqlens.tolist()
    alone = []
    with torch.no_grad():
        packed = stage(batch, torch.arange(batch.length))
        for a, b in zip(bounds, bounds[1:], strict=False):
            mine = (batch.image_starts >= a) & (batch.image_starts < b)
            single = Batch(
                cu_seqlens=torch.tensor([0, b - a], dtype=torch.int32),
                position_ids=torch.arange(b - a),
                num_images=int(mine.sum()),
                image_starts=batch.image_starts[mine] - a,
                num_samples=1,
                tokens=batch.tokens[a:b],
                labels=batch.labels[a:b],
                pixels=batch.pixels[mine],
            )
            alone.append(stage(single, torch.arange(b - a)))
    return packed, torch.cat(alone)


def test_an_isolated_pack_gives_each_sample_its_own_loss() -> None:
    ((packed, alone),) = run_ranks(1, losses_packed_and_alone, small_config())
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=1e-5)


def rotary_inputs(process: ProcessInfo, config: RunConfig) -> Tensor:
    stage, _ = build_both(process, config)
    return stage._attention_inputs(make_batch(0, 0, config))[1]


def test_rotary_positions_restart_with_every_segment() -> None:
    """Rotary attention is relative, so outputs cannot show a missing restart; the angles can."""
    (angles,) = run_ranks(1, rotary_inputs, small_config())
    for start in (0, 20, 38):
        assert angles[start].abs().max() == 0
        torch.testing.assert_close(angles[start + 1, 0, 0, 0], torch.tensor(1.0))


def generate_and_check(process: ProcessInfo, config: RunConfig) -> dict[str, Any]:
    """Greedy answers to several prompts at once, alone, and by the reference's arg max."""
    stage, reference = build_both(process, config)
    tokenizer = load_tokenizer(None)
    tokenizer.vocab_size = config.model.decoder.vocab_size  # the small model has fewer ids than the tokenizer
    generator = Generator(stage, tokenizer, torch.device("cpu"))
    rng = torch.Generator().manual_seed(0)

    def prompt(length: int, images: int) -> Prompt:
        starts = [1 + 6 * i for i in range(images)]
        pixels = torch.randint(0, 256, (images, 3, 56, 56), dtype=torch.uint8, generator=rng)
        return Prompt(torch.randint(0, 128, (length,), generator=rng).tolist(), starts, pixels)

    prompts = [prompt(16, 1), prompt(9, 0), prompt(21, 2)]
    together = generator.generate(prompts, max_new_tokens=6)
    alone = [generator.generate([p], max_new_tokens=6)[0] for p in prompts]
    expected = []
    for p in prompts:
        tokens = list(p.tokens)
        for _ in range(6):
            starts = [(0, start) for start in p.image_starts]
            with torch.no_grad():
                tokens.append(int(reference(torch.tensor([tokens]), p.pixels, starts)[0, -1].argmax()))
        expected.append(tokens[len(p.tokens) :])
    return {"together": together, "alone": alone, "expected": expected}


def test_greedy_decoding_equals_the_reference() -> None:
    (result,) = run_ranks(1, generate_and_check, small_config())
    assert result["together"] == result["alone"] == result["expected"]
    assert len({tuple(answer) for answer in result["expected"]}) == 3


def meta_shapes(process: ProcessInfo, config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Full shapes of the model's tensors, built on the meta device."""
    from megatron_qwenvl.model.engine_config import build_engine_configs

    runtime = start_engine(config, process)
    with torch.device("meta"):
        configs = build_engine_configs(config, runtime.kernels, on_gpu=False)
        layers = make_partition(config, 1).layers
        stage = QwenVLStage(config.model, configs, layers, runtime.kernels, runtime.groups)
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in stage.sharded_state_dict().values():
        assert entry.data.device.type == "meta"
        shapes[entry.key] = tuple(entry.data.shape)
    return shapes


def test_full_size_element_counts() -> None:
    """The built model has exactly the published number of elements in every part."""
    from math import prod

    from megatron_qwenvl.config.recipes import stage1
    from megatron_qwenvl.model.layers import layer_of
    from megatron_qwenvl.model.shapes import count_parameters, tensor_shapes

    on_cpu = stage1().model_copy(update={"runtime": RuntimeConfig(device="cpu")})
    (shapes,) = run_ranks(1, meta_shapes, on_cpu)
    assert shapes == tensor_shapes(stage1().model)
    totals = {"vit": 0, "adapter": 256 * 4096, "decoder": 0}  # the constant sin-cos table is published too
    for key, shape in shapes.items():
        totals[layer_of(key).part] += prod(shape)
    assert totals == {"vit": 1_842_770_688, "adapter": 92_839_936, "decoder": 7_721_324_544}
    assert sum(totals.values()) == 9_656_935_168
    assert count_parameters(stage1())["decoder"] == (7_721_324_544, 0)


def test_small_model_has_uneven_sizes() -> None:
    """The small test model must not hide a swapped dimension behind equal numbers."""
    assert SMALL.vision.width != SMALL.decoder.hidden != SMALL.decoder.ffn_hidden
