"""Configuration schema: every field of a run with its meaning and unit.

The sections are in reading order: the model (`model`), its data (`data`), the training (`train`, `optimizer`), the
machines (`parallel`, `runtime`) and the output (`checkpoint`, `logging`). The string below a field is its
documentation, which `python -m megatron_qwenvl.train --help` and docs/configuration.md show.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Stage = Literal["stage1", "stage2", "stage3"]
Family = Literal["qwen", "qwen2"]
FreezableGroup = Literal["vit", "adapter", "adapter_output", "decoder"]
Packing = Literal["none", "isolated", "interleaved"]


class Section(BaseModel):
    """Base of every section: immutable, strict about unknown keys, documented by attribute strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class VisionConfig(Section):
    """The ViT (OpenCLIP ViT-bigG/14 trunk without class token and without `ln_post`)."""

    layers: int = Field(48, ge=1)
    """Number of transformer layers."""
    width: int = Field(1664, ge=1)
    """Hidden size."""
    heads: int = Field(16, ge=1)
    """Attention heads; must divide `width` and be divisible by tensor parallelism."""
    mlp_hidden: int = Field(8192, ge=1)
    """Hidden size of the MLP."""
    patch_size: int = Field(14, ge=1)
    """Side of a square patch in pixels."""
    position_grid: int = Field(16, ge=1)
    """Side of the learned position table; the table has position_grid^2 rows."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of every LayerNorm."""


class AdapterConfig(Section):
    """The position-aware adapter: a single cross-attention from learned queries to the patches of an image."""

    query_grid: int = Field(16, ge=1)
    """Side of the square grid of learned queries; an image becomes query_grid^2 decoder tokens."""
    heads: int = Field(32, ge=1)
    """Attention heads over the decoder's hidden size."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of every LayerNorm."""


class DecoderConfig(Section):
    """The language model. The defaults are Qwen-7B."""

    family: Family = "qwen"
    """Architecture: `qwen` is Qwen-7B, `qwen2` is Qwen2 and Qwen2.5 (7B and larger), see docs/families.md."""
    layers: int = Field(32, ge=1)
    """Number of transformer layers."""
    hidden: int = Field(4096, ge=1)
    """Hidden size; also the adapter's width."""
    heads: int = Field(32, ge=1)
    """Attention heads; must divide `hidden` into even head sizes."""
    query_groups: int | None = Field(None, ge=1)
    """Number of key-value heads, each shared by a group of attention heads (grouped-query attention; `qwen2` only);
    none: equal to `heads`."""
    ffn_hidden: int = Field(11008, ge=1)
    """Hidden size of the SwiGLU MLP (half of the published `intermediate_size`)."""
    vocab_size: int = Field(151936, ge=1)
    """Rows of the embedding and of the untied output layer, padding included."""
    rotary_base: int = Field(10000, ge=1)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of every RMSNorm."""


class ModelConfig(Section):
    """Shape of the model. The defaults are the published 9.6B-parameter Qwen-VL."""

    vision: VisionConfig = VisionConfig()
    """The ViT."""
    adapter: AdapterConfig = AdapterConfig()
    """The adapter."""
    decoder: DecoderConfig = DecoderConfig()
    """The decoder."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initialization of linear layers and embeddings."""

    @property
    def image_tokens(self) -> int:
        """Decoder positions filled by one image, without its `<img>` and `</img>` markers."""
        return self.adapter.query_grid**2


class SourceConfig(Section):
    """One data set: a directory of indexed WebDataset shards. `--data.sources.NAME.weight 2` changes one by name."""

    name: str
    """Short unique name, used in logs and metrics."""
    path: str
    """Directory that holds the shards (`*.tar`) and their index; relative to `data.root`."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples drawn from this source, relative to the other sources' weights."""
    language: Literal["en", "zh"] = "en"
    """Language of the caption prompt of samples without a language of their own (img2dataset shards)."""


class DataConfig(Section):
    """Sources, images, batches, packing and loading."""

    root: str = "data"
    """Base directory of relative source paths."""
    sources: tuple[SourceConfig, ...] = ()
    """The training mixture."""
    validation_sources: tuple[SourceConfig, ...] = ()
    """Held-out sources for periodic validation; empty: no validation."""
    tokenizer: str | None = None
    """Path of the vocabulary: a `qwen.tiktoken` for a decoder of the family `qwen`, a `tokenizer.json` for `qwen2`;
    none: the built-in byte-level encoding."""
    image_size: int = Field(224, ge=1)
    """Side in pixels to which every image is resized; a multiple of the patch size."""
    global_batch_size: int = Field(30720, ge=1)
    """Samples per optimizer step over all ranks."""
    packing: Packing = "isolated"
    """`none`: one padded sample per row; `isolated`: packed with a block-diagonal mask, so that samples do not attend
    to each other; `interleaved`: samples of one task packed into one sequence with a causal mask."""
    max_sample_length: int = Field(512, ge=8)
    """Maximum length of a sample in tokens (image slots included); longer samples are skipped and counted."""
    pack_length: int = Field(4096, ge=8)
    """Maximum length of a pack in tokens; a packed micro-batch is one pack, padded to a multiple of 64 positions.
    Unused with `packing: none`."""
    max_image_pixels: int = Field(50_000_000, ge=1, le=178_956_970)
    """Maximum number of pixels (width x height) of an image; samples with larger images are skipped and counted. The
    index excludes images of more than 178,956,970 pixels, Pillow's own limit, in any case."""
    shuffle_window: int = Field(8, ge=1)
    """Number of shards among which samples are shuffled; with 1, reads are the most sequential."""
    skip_steps: tuple[tuple[int, int], ...] = ()
    """Ranges [a, b] of steps whose data is skipped, both ends included: step a trains on the data of step b + 1. Steps
    count from 0, as in metrics.jsonl and show_step, and are numbered as without the range. Step numbers and learning
    rate are not affected."""
    on_change: Literal["continue", "stop"] = "continue"
    """Action at the start if data, mixture or batch size differ from the checkpoint's record: `continue` logs the
    differences and continues with the next samples of each source, `stop` refuses to start."""
    workers: int = Field(4, ge=0)
    """Worker processes per rank that read and decode ahead of the step; 0: the main process reads."""
    prefetch: int = Field(4, ge=1)
    """Minimum number of micro-batches that each worker prepares ahead; larger if a step has more."""
    max_unreadable_share: float = Field(0.05, ge=0, le=1)
    """Maximum share of unreadable samples among the newest `unreadable_window`; beyond it the run stops with a message
    that names the worst shards; 1: no limit."""
    unreadable_window: int = Field(2000, ge=1)
    """Number of samples over which that share is computed; at least a global batch."""


class TrainConfig(Section):
    """The training loop."""

    steps: int = Field(50_000, ge=1)
    """Optimizer steps of the whole run."""
    stop_after: int | None = Field(None, ge=1)
    """Stop after this step (with a checkpoint, see `checkpoint.save`), without a change of the schedule; none: run
    to `steps`."""
    frozen: tuple[FreezableGroup, ...] = ()
    """Parts of the model that are not trained. `adapter_output` is the adapter's final norm and projection only."""
    gradient_accumulation: int = Field(6, ge=1)
    """Micro-batches per step and data-parallel rank with `packing: none`. With packing their number is
    ceil(packs of the step / data-parallel size)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Parameter and activation type; gradients and optimizer state are fp32 in both."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, attention scores only, or whole layers."""
    clip_grad: float = Field(1.0, ge=0)
    """Maximum global L2 norm of the gradient; 0: no clipping."""
    max_skipped_steps: int = Field(10, ge=0)
    """Maximum number of consecutive skipped steps (non-finite loss or gradient, or no supervised token); beyond it
    the run stops."""
    validation_interval: int = Field(1000, ge=0)
    """Steps between validations; 0: no validation."""
    validation_samples: int = Field(4096, ge=1)
    """Number of samples of a validation."""


class OptimizerConfig(Section):
    """AdamW with a cosine schedule."""

    lr: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(500, ge=0)
    """Steps of linear warm-up from zero."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.98, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-6, gt=0)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay; not applied to biases, norms and other 1-D parameters."""
    vit_layer_decay: float = Field(0.95, gt=0, le=1)
    """Layer-wise learning-rate decay of the ViT: multiplier per layer of distance from the adapter. The last layer
    has multiplier 1, the patch embedding and positions have vit_layer_decay^layers; 1: no decay."""
    sharded: bool = True
    """Shard optimizer state over data-parallel ranks (distributed optimizer)."""


class ParallelConfig(Section):
    """Parallel layout. The data-parallel size is the world size divided by `tensor` x `pipeline`."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel size of ViT, adapter and decoder."""
    pipeline: int = Field(1, ge=1)
    """Pipeline-parallel size."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence, in both towers."""
    layout: tuple[int, ...] | None = None
    """Index of the first layer of pipeline stages 2..N in the list patch embedding, ViT layers, adapter,
    word embedding, decoder layers, head; none: balanced by estimated cost."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction with the backward pass."""


class RuntimeConfig(Section):
    """Devices, kernels and processes."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: CUDA with NCCL when a GPU is visible, otherwise CPU with gloo."""
    kernels: Literal["auto", "te", "apex", "torch"] = "auto"
    """Implementation of linear layers, norms and optimizer: `te` is Transformer Engine, `apex` has the norms and the
    optimizer of apex, `torch` is plain torch. `auto`: the first of te, apex, torch that works on the device."""
    hang_minutes: float = Field(15, ge=0)
    """Time without a completed step, validation or save after which every rank writes its stacks to `run_dir`/stacks
    and the run ends; 0: no limit."""
    timeout_minutes: float = Field(20, gt=0)
    """Timeout of a collective, after which the run ends; longer than `hang_minutes`, so that the stacks are written
    first."""
    retry_minutes: float | None = Field(None, ge=0)
    """Time for which a read of data or of a checkpoint is repeated after a transient file-system error; less than
    `hang_minutes`. none: 10, or two thirds of `hang_minutes` if that is less; 0: no repetition."""
    takeover_minutes: float = Field(2, gt=0)
    """Time without a heartbeat after which a start takes over the run directory from an owner whose state it cannot
    determine otherwise: one on another machine, outside of Slurm. Measured by the clock of the start."""
    threads: int = Field(0, ge=0)
    """CPU threads per process; 0: OMP_NUM_THREADS or torch's default."""

    @property
    def retry_seconds(self) -> float:
        """`retry_minutes` in seconds, with the default resolved."""
        if self.retry_minutes is not None:
            return 60 * self.retry_minutes
        return 60 * min(10.0, (self.hang_minutes or self.timeout_minutes) * 2 / 3)


class CheckpointConfig(Section):
    """Saving and loading."""

    init_from: str | None = None
    """Checkpoint directory with the initial weights of the run, used if the run has no checkpoint of its own."""
    save: bool = True
    """Save checkpoints; false is for throughput measurements and needs `train.stop_after`."""
    interval: int = Field(500, ge=0)
    """Steps between saves; 0: only at the end."""
    keep_last: int = Field(3, ge=1)
    """Number of newest checkpoints to keep; older ones are removed after a newer save is complete."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints at multiples of this step are never removed; 0: none."""
    asynchronous: bool = False
    """Copy the state to host memory and write it in the background while training continues."""
    on_failure: Literal["stop", "continue"] = "stop"
    """Action after a failed save (a full disk): stop the run or continue; older checkpoints are kept in both cases."""
    timeout_minutes: float = Field(240, gt=0)
    """Timeout of collectives while a checkpoint is written, verified or moved into place; runtime.hang_minutes and
    runtime.timeout_minutes do not apply meanwhile."""


class LoggingConfig(Section):
    """Progress lines and metrics."""

    interval: int = Field(1, ge=1)
    """Steps between progress lines and metric records."""
    tensorboard: bool = True
    """Write TensorBoard event files beside the JSONL metrics."""


class RunConfig(Section):
    """Complete configuration of a run."""

    name: str = "stage1"
    """Name of the run, shown in logs."""
    stage: Stage = "stage1"
    """Training stage; recorded in checkpoints and checked where the next one starts."""
    run_dir: str = "runs/stage1"
    """Directory of the resolved configuration, metrics and checkpoints."""
    seed: int = Field(1234, ge=0)
    """Seed of initialization and of the data order."""
    model: ModelConfig = ModelConfig()
    """Shape of the model."""
    data: DataConfig = DataConfig()
    """Data, batches and packing."""
    train: TrainConfig = TrainConfig()
    """The training loop."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    parallel: ParallelConfig = ParallelConfig()
    """Parallel layout."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Devices, kernels and processes."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and loading."""
    logging: LoggingConfig = LoggingConfig()
    """Progress lines and metrics."""
