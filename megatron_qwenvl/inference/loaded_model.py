"""Whole model in one process, for notebooks and evaluations; can be loaded and closed repeatedly."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from megatron_qwenvl.checkpoint.run.weights import load_weights
from megatron_qwenvl.checkpoint.storage.manifest import HFMetadata
from megatron_qwenvl.config.schema import ParallelConfig, RunConfig
from megatron_qwenvl.data.images import image_size, load_pixels
from megatron_qwenvl.data.records.tasks import TaskRecord, parse_record
from megatron_qwenvl.data.rendering.renderer import Renderer
from megatron_qwenvl.data.rendering.token_builder import ImageInfo
from megatron_qwenvl.data.rendering.tokenizer import Tokenizer, load_decoder_tokenizer
from megatron_qwenvl.engine.start import Runtime, engine_is_running, start_engine, stop_engine
from megatron_qwenvl.model.build import build_stage
from megatron_qwenvl.model.long_context import LongContext, long_context
from megatron_qwenvl.model.partition import make_partition
from megatron_qwenvl.model.stage import QwenVLStage
from megatron_qwenvl.runtime.processes import ProcessInfo

from .prompt import Prompt

ONE_PROCESS = ProcessInfo(0, 1, 0, 1, init_method="", launcher="single")
_NO_PIXELS = np.empty((0, 3, 1, 1), np.uint8)


@dataclass(frozen=True)
class LoadedModel:
    """Undivided model on one device; a context manager that closes the model at its end."""

    config: RunConfig
    """The configuration, with all parallel sizes 1."""
    stage: QwenVLStage
    """The model: one pipeline stage that holds all layers."""
    context: LongContext
    """Context extension beyond the trained length."""
    tokenizer: Tokenizer
    """Vocabulary of the model."""
    runtime: Runtime
    """Device and process groups."""
    _cleanup: ExitStack
    """Stops the engine and restores torch's settings."""

    def prompt(self, record: TaskRecord | dict[str, Any], images: Sequence[str | Path] = ()) -> Prompt:
        """Make a prompt of a record without its answer, such as `{"task": "vqa", "question": "How many?"}`.

        Args:
            record: content of a sample's `json` file.
            images: image files, in the order of the record.

        Raises:
            SampleError: a malformed record, or images that it does not match or that cannot be read.
            OSError: a file cannot be read.
        """
        encoded = [(Path(image).name, Path(image).read_bytes()) for image in images]
        parsed = parse_record(record) if isinstance(record, dict) else record
        return make_prompt(self.config, self.tokenizer, parsed, encoded)

    def close(self) -> None:
        """Stop the engine and restore torch's settings; the model cannot be used afterwards."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_prompt(
    config: RunConfig, tokenizer: Tokenizer, record: TaskRecord, images: Sequence[tuple[str, bytes]]
) -> Prompt:
    """Render a record up to its answer, with the pixels of its images.

    Args:
        config: gives image size and slots per image.
        tokenizer: vocabulary of the model.
        record: task and question.
        images: file name and encoded bytes of each image.

    Raises:
        SampleError: images that the record does not match or that cannot be read.
    """
    data = config.data
    infos = [ImageInfo(name, *image_size(image)) for name, image in images]
    rendered = Renderer(tokenizer, config.model.image_tokens).render(record, infos, answer=False)
    pixels = [load_pixels(image, data.image_size, data.max_image_pixels) for _, image in images]
    shown = np.stack([pixels[i] for i in rendered.image_order]) if pixels else _NO_PIXELS
    return Prompt(rendered.tokens, rendered.image_starts, torch.from_numpy(shown))


def load_model(config: RunConfig, checkpoint: str | Path | None = None) -> LoadedModel:
    """Start the engine in this process, build the model and load a checkpoint of any parallel layout.

    Args:
        config: the model and its data; the parallel sizes are not used.
        checkpoint: checkpoint directory, a run's checkpoints folder or a run's directory; None: fresh weights.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another model.
        DataError: the vocabulary cannot be read.
        RuntimeError: this process has an engine running: a model that is not closed, or a training run.
    """
    if engine_is_running():
        raise RuntimeError("load_model: expected a process without a running engine: close the model before")
    single = config.model_copy(update={"parallel": ParallelConfig()})
    tokenizer = load_decoder_tokenizer(config)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        stack.callback(setattr, sys, "excepthook", sys.excepthook)  # which joining the process group wraps
        stack.callback(stop_engine)
        runtime = start_engine(single, ONE_PROCESS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"megatron\.core")
            stage, context = load_stage(single, runtime, None if checkpoint is None else Path(checkpoint))
        return LoadedModel(single, stage, context, tokenizer, runtime, stack.pop_all())


def load_stage(
    config: RunConfig, runtime: Runtime, checkpoint: Path | None
) -> tuple[QwenVLStage, LongContext]:
    """Build the undivided model and load `checkpoint`, unless it is None.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another model.
        ValueError: the runtime has tensor or pipeline parallelism.
    """
    if runtime.tensor_size * runtime.pipeline_size > 1:
        raise ValueError(
            f"generation expects an undivided model, found tensor {runtime.tensor_size} x "
            f"pipeline {runtime.pipeline_size}"
        )
    stage = build_stage(config, runtime, make_partition(config, runtime.data_size))
    found = load_weights(checkpoint, config, stage).hf_metadata if checkpoint else None
    found = found or HFMetadata()
    settings = LongContext(found.seq_length, found.use_dynamic_ntk, found.use_logn_attn)
    return stage.eval(), long_context(config.model.decoder, settings)
