"""Every layout computes the loss and every gradient of the one-process run, to fp32 rounding."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from .harness import run_ranks
from .model_cases import assemble, gradients_of, make_batch, small_config

FROZEN = {
    "stage1": ("decoder",),
    "stage2": (),
    "stage3": ("vit",),
    "published_sft": ("vit", "adapter_output"),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_cut_before_adapter": (2, {"pipeline": 2, "layout": (5,)}),
    "pp2_cut_after_adapter": (2, {"pipeline": 2, "layout": (6,)}),
    "pp4_cut_in_vit": (4, {"pipeline": 4, "layout": (2, 5, 8)}),
    "pp4_head_alone": (4, {"pipeline": 4, "layout": (1, 6, 10)}),
    "tp2_pp2_sp": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    "tp2_pp2_sp_cut_in_vit": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "layout": (3,)}),
    "dp2": (2, {}),
    "dp2_overlap": (2, {"overlap_grad_reduce": True}),
}
# Images per micro-batch: different counts, one without, and (second case) all without.
IMAGE_COUNTS = {"mixed": (2, 0, 3, 1), "text_only": (0, 0)}

# Observed differences stay below 2e-7 with gradients up to 0.2.
ABSOLUTE, RELATIVE = 2e-6, 1e-5


@cache
def one_process(frozen: str, counts: str) -> dict[str, Any]:
    config = small_config(FROZEN[frozen])
    batches = [make_batch(i, n, config) for i, n in enumerate(IMAGE_COUNTS[counts])]
    (result,) = run_ranks(1, gradients_of, config, batches)
    return {"batches": batches, "report": result["report"], "gradients": assemble(result["gradients"])}


def assert_equal(result: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for rank in result:
        assert rank["report"].loss == pytest.approx(expected["report"].loss, rel=1e-6)
        assert rank["report"].loss_tokens == expected["report"].loss_tokens
        assert rank["report"].task_losses == pytest.approx(expected["report"].task_losses, rel=1e-5)
    gradients = assemble([shard for rank in result for shard in rank["gradients"]])
    assert gradients.keys() == expected["gradients"].keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            gradient,
            expected["gradients"][key],
            atol=ABSOLUTE,
            rtol=RELATIVE,
            msg=lambda m, key=key: f"{key}: {m}",
        )


# The published frozen set adds nothing to stage 3 without images.
CASES = [(f, c) for f in FROZEN for c in IMAGE_COUNTS if (f, c) != ("published_sft", "text_only")]


@pytest.mark.parametrize(("frozen", "counts"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str, frozen: str, counts: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    expected = one_process(frozen, counts)
    result = run_ranks(ranks, gradients_of, small_config(FROZEN[frozen], **parallel), expected["batches"])
    assert_equal(result, expected)


def test_gradients_are_not_trivial() -> None:
    """Every trained tensor gets a gradient, and vision gets none from text alone."""
    mixed = one_process("stage2", "mixed")["gradients"]
    assert all(gradient.abs().max() > 0 for gradient in mixed.values())
    text = one_process("stage2", "text_only")["gradients"]
    assert all(text[key].abs().max() == 0 for key in text if key.startswith(("vit", "patch", "adapter")))


@pytest.mark.parametrize("frozen", ["stage1", "stage2", "stage3"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("layout", ["tp2_pp2_sp", "tp2_pp2_sp_cut_in_vit"])
def test_recomputation_changes_nothing(layout: str, recompute: str, frozen: str) -> None:
    expected = one_process(frozen, "mixed")
    config = small_config(FROZEN[frozen], **LAYOUTS[layout][1])
    config = config.model_copy(update={"train": config.train.model_copy(update={"recompute": recompute})})
    assert_equal(run_ranks(4, gradients_of, config, expected["batches"]), expected)


def test_no_backward_message_into_a_frozen_prefix() -> None:
    """With the ViT frozen, stages below the first trained layer receive no gradient message."""
    config = small_config(("vit",), pipeline=4, layout=(2, 5, 8))
    batches = [make_batch(i, n, config) for i, n in enumerate((2, 0, 3))]
    result = run_ranks(4, gradients_of, config, batches)
    assert [rank["gradients_received"] for rank in result] == [0, 0, 3, 0]


def test_doubled_resolution_over_the_pipeline() -> None:
    """Interpolated positions at twice the grid, with the cut inside the ViT."""
    config = small_config(image_size=112)
    batches = [make_batch(i, n, config) for i, n in enumerate((1, 2))]
    (alone,) = run_ranks(1, gradients_of, config, batches)
    expected = {"report": alone["report"], "gradients": assemble(alone["gradients"])}
    layout = small_config(image_size=112, tensor=2, pipeline=2, sequence_parallel=True, layout=(3,))
    assert_equal(run_ranks(4, gradients_of, layout, batches), expected)
