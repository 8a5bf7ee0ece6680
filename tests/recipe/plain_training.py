"""The training recipe of the paper (arXiv 2308.12966, Table 8 and section 2) in plain PyTorch.

`torch.optim.AdamW` over the plain model of `tests/reference_model.py`, one sample or pack at a time, on one process;
nothing of `megatron_qwenvl/training` is used. Names are those of the published checkpoint.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference_model import ReferenceModel

from .plain_samples import Tokens

Pack = Sequence[Tokens]
"""Samples of a micro-batch."""
VISUAL = "transformer.visual."
ADAPTER = (f"{VISUAL}attn_pool.", f"{VISUAL}ln_post.", f"{VISUAL}proj")


def is_decoder(name: str) -> bool:
    """Embedding, decoder layers, final norm and head."""
    return not name.startswith(VISUAL)


def is_vit(name: str) -> bool:
    """Patch embedding, positions and ViT layers."""
    return name.startswith(VISUAL) and not name.startswith(ADAPTER)


@dataclass(frozen=True)
class Recipe:
    """Numbers of a training stage; betas and eps are the paper's."""

    frozen: Callable[[str], bool]
    steps: int
    warmup: int
    peak: float
    floor: float
    layer_decay: float
    weight_decay: float
    clip: float
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 1: linear from zero to the peak, then a cosine to the floor."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * done)) / 2


@dataclass
class Trained:
    """Loss, gradient norm before clipping and learning rate of every step, and the final weights."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    weights: dict[str, Tensor]


def train(
    model: ReferenceModel, steps: Sequence[Sequence[Pack]], recipe: Recipe, interleaved: bool
) -> Trained:
    """Train `model` in place on the packs of every step.

    Args:
        model: with the weights to start from.
        steps: the global batch of every step as packs.
        recipe: numbers of the stage.
        interleaved: the samples of a pack are one sequence; otherwise each sample is a sequence of its own.
    """
    trained = {name: p for name, p in model.named_parameters() if not recipe.frozen(name)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    layers = len(model.transformer.visual.transformer.resblocks)
    scales = [recipe.layer_decay ** depth_below_adapter(name, layers) for name in trained]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": recipe.weight_decay if p.ndim > 1 else 0.0}
            for p in trained.values()
        ],
        betas=recipe.betas,
        eps=recipe.eps,
    )
    result = Trained([], [], [], {})
    for number, packs in enumerate(steps, 1):
        rate = recipe.rate(number)
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = rate * scale
        optimizer.zero_grad()
        loss = token_mean(model, packs, interleaved)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained.values(), recipe.clip)
        optimizer.step()
        result.losses.append(loss.item())
        result.norms.append(norm.item())
        result.rates.append(rate)
    result.weights = {name: p.detach() for name, p in model.named_parameters()}
    return result


def depth_below_adapter(name: str, layers: int) -> int:
    """0 for the ViT layer nearest the adapter and for what is outside the ViT, `layers` for patches and positions."""
    if not is_vit(name):
        return 0
    layer = re.search(r"resblocks\.(\d+)\.", name)
    return layers - 1 - int(layer[1]) if layer else layers


def token_mean(model: ReferenceModel, packs: Sequence[Pack], interleaved: bool) -> Tensor:
    """Mean loss of the supervised tokens of the global batch."""
    sequences = [
        sequence for pack in packs for sequence in ([pack] if interleaved else [[sample] for sample in pack])
    ]
    sums, counts = zip(*(summed_loss(model, sequence) for sequence in sequences), strict=True)
    return torch.stack(sums).sum() / sum(counts)


def summed_loss(model: ReferenceModel, sequence: Pack) -> tuple[Tensor, int]:
    """Summed loss and number of the supervised tokens of samples that form one causal sequence.

    Position t predicts token t + 1; nothing predicts the first token of a sample.
    """
    tokens = torch.tensor([token for sample in sequence for token in sample.ids])
    loss_mask = torch.tensor([on and i > 0 for sample in sequence for i, on in enumerate(sample.loss_mask)])
    offsets = itertools.accumulate((len(sample.ids) for sample in sequence), initial=0)
    starts = [(0, o + at) for o, sample in zip(offsets, sequence, strict=False) for at in sample.image_starts]
    pixels = torch.cat([sample.pixels for sample in sequence])
    logits = model(tokens[None], pixels, starts)[0]
    losses = F.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    return losses[loss_mask[1:]].sum(), int(loss_mask[1:].sum())
