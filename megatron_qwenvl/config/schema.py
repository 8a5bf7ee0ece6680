"""The one configuration schema: every field that a run can be given, with its meaning and unit.

Section order is reading order: what is trained (`model`), on what (`data`), how (`train`, `optimizer`),
on which machines (`parallel`, `runtime`) and what is kept (`checkpoint`, `logging`). The string below a
field is its documentation and is what `python -m megatron_qwenvl.train --help` prints.
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
    """The position-aware adapter: one cross-attention from learned queries to the image's patches."""

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
    """Key and value heads, each shared by a group of attention heads (grouped-query attention, `qwen2` alone); none:
    every attention head has its own."""
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
    """Standard deviation of freshly initialized linear layers and embeddings."""

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
    """Language of the caption prompt for samples that do not say theirs (img2dataset shards)."""


class DataConfig(Section):
    """What a step is made of."""

    root: str = "data"
    """Directory that relative source paths start from."""
    sources: tuple[SourceConfig, ...] = ()
    """The training mixture."""
    validation_sources: tuple[SourceConfig, ...] = ()
    """Held-out sources for periodic validation; empty: no validation."""
    tokenizer: str | None = None
    """Path of the vocabulary: a `qwen.tiktoken` for a decoder of the family `qwen`, a `tokenizer.json` for `qwen2`;
    none: the embedded byte-level encoding."""
    image_size: int = Field(224, ge=1)
    """Side in pixels that every image is resized to; a multiple of the patch size."""
    global_batch_size: int = Field(30720, ge=1)
    """Samples per optimizer step over all ranks."""
    packing: Packing = "isolated"
    """`none`: one sample a row, padded; `isolated`: packed under a block-diagonal mask, samples do not see each other;
    `interleaved`: samples of one task packed into one sequence under a plain causal mask."""
    max_sample_length: int = Field(512, ge=8)
    """Longest sample in tokens (image slots included); longer ones are skipped and counted."""
    pack_length: int = Field(4096, ge=8)
    """Most tokens of one pack; a packed micro-batch is one pack, padded to a multiple of 64 positions. Unused
    with `packing: none`."""
    max_image_pixels: int = Field(50_000_000, ge=1, le=178_956_970)
    """Images with more pixels (width x height) than this are skipped and counted; the index leaves out those with more
    than 178,956,970, Pillow's own limit, in any case."""
    shuffle_window: int = Field(8, ge=1)
    """Shards that are open for shuffling at a time; 1 keeps reads most sequential."""
    skip_steps: tuple[tuple[int, int], ...] = ()
    """Ranges [a, b] of steps whose data is left out, both ends included; step a trains on what step b + 1 would have
    had. Steps count from 0, as metrics.jsonl and show_step have them, and as they were before the range was added.
    Steps and learning rate go on as without it."""
    on_change: Literal["continue", "stop"] = "continue"
    """What a start does where data, mixture or batch size differ from what the checkpoint records: say it and go on
    from the samples that each source has given, or refuse."""
    workers: int = Field(4, ge=0)
    """Worker processes per rank that read and decode ahead of the step; 0: in the main process."""
    prefetch: int = Field(4, ge=1)
    """Micro-batches that each worker prepares ahead, at least; more where a step has more."""
    max_unreadable_share: float = Field(0.05, ge=0, le=1)
    """Largest share of unreadable samples among the newest `unreadable_window`; a larger one stops the run with the
    worst shards named; 1: never."""
    unreadable_window: int = Field(2000, ge=1)
    """Samples over which that share is taken; at least a global batch."""


class TrainConfig(Section):
    """The training loop."""

    steps: int = Field(50_000, ge=1)
    """Optimizer steps of the whole run."""
    stop_after: int | None = Field(None, ge=1)
    """Stop (with a checkpoint, see `checkpoint.save`) after this step although the schedule goes on; none: run
    to `steps`."""
    frozen: tuple[FreezableGroup, ...] = ()
    """Parts that are not trained. `adapter_output` is the adapter's final norm and projection alone."""
    gradient_accumulation: int = Field(6, ge=1)
    """Micro-batches per step and data-parallel rank with `packing: none`. With packing the packs of the
    step decide: ceil(packs / data-parallel size)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Parameter and activation type; gradients and optimizer state are fp32 in both."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, attention scores only, or whole layers."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest global L2 norm of the gradient; 0: no clipping."""
    max_skipped_steps: int = Field(10, ge=0)
    """Consecutive steps skipped for a non-finite loss or gradient, or without a supervised token, before the run
    stops."""
    validation_interval: int = Field(1000, ge=0)
    """Steps between validations; 0: never."""
    validation_samples: int = Field(4096, ge=1)
    """Samples of one validation."""


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
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay; not applied to biases, norms and other 1-D parameters."""
    vit_layer_decay: float = Field(0.95, gt=0, le=1)
    """Learning-rate multiplier per ViT layer counted down from the adapter: the layer nearest the adapter
    has multiplier 1, the patch embedding and positions vit_layer_decay^layers; 1: no decay."""
    sharded: bool = True
    """Shard optimizer state over data-parallel ranks (distributed optimizer)."""


class ParallelConfig(Section):
    """How the model is cut. Data parallelism is what remains of the world size."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel size of ViT, adapter and decoder."""
    pipeline: int = Field(1, ge=1)
    """Pipeline-parallel size."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence, in both towers."""
    layout: tuple[int, ...] | None = None
    """Index of the first layer of pipeline stages 2..N in the list patch embedding, ViT layers, adapter,
    word embedding, decoder layers, head; none: chosen by cost."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction with the backward pass."""


class RuntimeConfig(Section):
    """Devices, kernels and processes."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: CUDA with NCCL when a GPU is visible, otherwise CPU with gloo."""
    kernels: Literal["auto", "te", "apex", "torch"] = "auto"
    """GEMM layers, norms and optimizer: Transformer Engine, apex norms and optimizer, or plain torch.
    `auto`: the first of te, apex, torch that works on the device."""
    hang_minutes: float = Field(15, ge=0)
    """Time without a step, a validation or a save after which every rank writes its stacks to `run_dir`/stacks and the
    run ends; 0: never."""
    timeout_minutes: float = Field(20, gt=0)
    """Time after which a collective that does not finish ends the run; longer than `hang_minutes`, so that the stacks
    are written first."""
    retry_minutes: float | None = Field(None, ge=0)
    """Time for which a read of data or of a checkpoint is repeated where a file system gives an error that may go away;
    less than `hang_minutes`. none: 10, or two thirds of `hang_minutes` if that is less; 0: the first error counts."""
    takeover_minutes: float = Field(2, gt=0)
    """A run directory has one owner. Time without a sign of life after which a start takes over from an owner of which
    it can find out nothing else: one on another machine, outside of Slurm. By the clock of the start."""
    threads: int = Field(0, ge=0)
    """CPU threads per process; 0: OMP_NUM_THREADS or torch's default."""

    @property
    def retry_seconds(self) -> float:
        """`retry_minutes` in seconds, with what stands for none."""
        if self.retry_minutes is not None:
            return 60 * self.retry_minutes
        return 60 * min(10.0, (self.hang_minutes or self.timeout_minutes) * 2 / 3)


class CheckpointConfig(Section):
    """Saving and loading."""

    init_from: str | None = None
    """Checkpoint directory whose weights start the run when the run has no checkpoint of its own."""
    save: bool = True
    """False saves nothing, for throughput measurements; needs `train.stop_after`."""
    interval: int = Field(500, ge=0)
    """Steps between saves; 0: only at the end."""
    keep_last: int = Field(3, ge=1)
    """Checkpoints kept; older ones are removed after a newer save is complete."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints at multiples of this step are never removed; 0: none."""
    asynchronous: bool = False
    """Copy the state to host memory and write it while training goes on."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What a failed save (a full disk) does to the run; the older checkpoints stay in both cases."""
    timeout_minutes: float = Field(240, gt=0)
    """Time for which ranks wait for each other while a checkpoint is written, checked or put in place; meanwhile
    runtime.hang_minutes and runtime.timeout_minutes do not count."""


class LoggingConfig(Section):
    """What a run tells."""

    interval: int = Field(1, ge=1)
    """Steps between progress lines and metric records."""
    tensorboard: bool = True
    """Write TensorBoard event files beside the JSONL metrics."""


class RunConfig(Section):
    """A complete run."""

    name: str = "stage1"
    """Name of the run, shown in logs."""
    stage: Stage = "stage1"
    """Training stage; recorded in checkpoints and checked by stage transitions."""
    run_dir: str = "runs/stage1"
    """Directory for the resolved configuration, metrics and checkpoints."""
    seed: int = Field(1234, ge=0)
    """Seed of initialization and of the data order."""
    model: ModelConfig = ModelConfig()
    """Shape of the model."""
    data: DataConfig = DataConfig()
    """What a step is made of."""
    train: TrainConfig = TrainConfig()
    """The training loop."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is cut."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Devices and kernels."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and loading."""
    logging: LoggingConfig = LoggingConfig()
    """What a run tells."""
