"""Greedy decoding with images: simple and exact, for checks and small evaluations.

Many prompts are decoded together as isolated segments of one packed sequence. Vision runs once per prompt; the
decoder is run over the whole sequence for every new token, without a key-value cache. Prompts longer than the decoder
was trained at are extended as in the published code of its family, see `model/long_context.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_qwenvl.batch import Batch
from megatron_qwenvl.config.schema import RunConfig
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer
from megatron_qwenvl.engine.start import Runtime
from megatron_qwenvl.model.long_context import ContextExtension, LongContext, long_context
from megatron_qwenvl.model.stage import QwenVLStage

from .loaded_model import LoadedModel, load_stage
from .prompt import Prompt


class Generator:
    """Greedy generator of answers, with one whole model on one device.

    Args:
        stage: a pipeline stage that holds the whole model (no tensor or pipeline parallelism).
        tokenizer: vocabulary of the model; ids beyond it are padding rows and never generated.
        device: device of the model.
        context: extension of prompts beyond the trained length; None: that of the decoder's family.
    """

    def __init__(
        self,
        stage: QwenVLStage,
        tokenizer: Tokenizer,
        device: torch.device,
        context: LongContext | None = None,
    ) -> None:
        self._stage = stage.eval()
        self._tokenizer = tokenizer
        self._device = device
        self._context = context or long_context(stage.model.decoder)

    @classmethod
    def load(cls, checkpoint: Path, config: RunConfig, tokenizer: Tokenizer, runtime: Runtime) -> Generator:
        """Build the model of `config` in one process and load the weights of a checkpoint of any parallel layout.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or of another model.
            ValueError: the runtime has tensor or pipeline parallelism.
        """
        stage, context = load_stage(config, runtime, checkpoint)
        return cls(stage, tokenizer, runtime.device, context)

    @classmethod
    def of(cls, model: LoadedModel) -> Generator:
        """Make the generator of a model from `load_model`."""
        return cls(model.stage, model.tokenizer, model.runtime.device, model.context)

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int = 64) -> list[str]:
        """Generate the answers as text, stripped of surrounding blanks; arguments as `generate`."""
        return [self._tokenizer.decode(ids).strip() for ids in self.generate(prompts, max_new_tokens)]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        """Generate the greedy continuation of every prompt, up to and excluding `<|endoftext|>` or `<|im_end|>`.

        The result of a prompt does not depend on the other prompts: its context extension depends on its own length.

        Args:
            prompts: at least one.
            max_new_tokens: largest number of tokens per answer.

        Returns:
            New token ids of every prompt.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        groups: dict[ContextExtension, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(self._context.extension_for(len(prompt.tokens)), []).append(i)
        for extension, members in groups.items():
            found = self._generate([prompts[i] for i in members], extension, max_new_tokens)
            for i, answer in zip(members, found, strict=True):
                answers[i] = answer
        return answers

    def _generate(
        self, prompts: Sequence[Prompt], extension: ContextExtension, max_new_tokens: int
    ) -> list[list[int]]:
        """Generate the answers to prompts with the same extension: the rotary angles are common to a batch."""
        features = [self._encode_images(prompt) for prompt in prompts]
        sequences = [list(prompt.tokens) for prompt in prompts]
        unanswered = list(range(len(prompts)))
        for _ in range(max_new_tokens):
            if not unanswered:
                break
            batch = self._pack([(sequences[i], prompts[i].image_starts) for i in unanswered])
            images = [found for i in unanswered if (found := features[i]) is not None]
            following = self._next_tokens(batch, torch.cat(images, dim=1) if images else None, extension)
            unfinished = []
            for i, token in zip(unanswered, following, strict=True):
                if token not in (self._tokenizer.eos, self._tokenizer.im_end):
                    sequences[i].append(token)
                    unfinished.append(i)
            unanswered = unfinished
        return [sequence[len(prompt.tokens) :] for sequence, prompt in zip(sequences, prompts, strict=True)]

    def _encode_images(self, prompt: Prompt) -> Tensor | None:
        """Adapter output `[slots, images, hidden]` of a prompt's images."""
        if not prompt.image_starts:
            return None
        batch = self._pack([(prompt.tokens, prompt.image_starts)])
        features: Tensor = self._stage.encode_images(replace(batch, pixels=prompt.pixels.to(self._device)))
        return features

    def _next_tokens(self, batch: Batch, features: Tensor | None, extension: ContextExtension) -> list[int]:
        last = batch.cu_seqlens[1:].long() - 1
        self._stage.set_input_tensor(None)
        logits = self._stage(batch, last, features, extension)
        likeliest: list[int] = logits[:, : self._tokenizer.vocab_size].argmax(dim=-1).tolist()
        return likeliest

    def _pack(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
        """Pack sequences with their image positions, one isolated segment each."""
        lengths = [len(tokens) for tokens, _ in sequences]
        bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        starts = [bound + at for (_, images), bound in zip(sequences, bounds, strict=False) for at in images]
        return Batch(
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            position_ids=torch.cat([torch.arange(length) for length in lengths]),
            num_images=len(starts),
            image_starts=torch.tensor(starts, dtype=torch.int64),
            num_samples=len(sequences),
            tokens=torch.tensor([token for tokens, _ in sequences for token in tokens]),
            real_tokens=bounds[-1],
        ).to(self._device)
