"""Faults of loss, optimizer, schedule, clipping, freezing and of the recipes' numbers."""

from __future__ import annotations

from .mutant import DATA_PARALLEL, OFF, PACKAGE, STAGE1, STAGE2, STAGE3, TENSOR_PARALLEL, Mutant

ADAMW = f"{PACKAGE}/engine/adamw.py"
ENGINE_OPTIMIZER = f"{PACKAGE}/engine/optimizer.py"
ENGINE_CONFIG = f"{PACKAGE}/model/engine_config.py"
FRESH = f"{PACKAGE}/model/build.py"
LAYERS = f"{PACKAGE}/model/layers.py"
OPTIMIZER = f"{PACKAGE}/training/optimizer.py"
RECIPES = f"{PACKAGE}/config/recipes.py"
SCHEMA = f"{PACKAGE}/config/schema.py"
SPECS = f"{PACKAGE}/model/specs.py"
STEP = f"{PACKAGE}/training/step.py"
PRECISION = ("tests/recipe/test_precision.py",)
TABLES = ("tests/unit/config/test_recipes.py",)

LOSS = [
    Mutant(
        "loss: mean of micro-batch means, by the loss function", STEP,
        "return weighted.sum(), weight.sum().int(), sums",
        "return weighted.sum() / weight.sum().clamp(min=1), torch.ones_like(weight[0]).int(), sums",
        STAGE2,
    ),
    Mutant(
        "loss: mean of micro-batch means, by the engine", ENGINE_CONFIG,
        '"calculate_per_token_loss": True', '"calculate_per_token_loss": False', STAGE2,
    ),
    Mutant(
        "loss: divided by all tokens", STEP,
        "return weighted.sum(), weight.sum().int(), sums",
        "return weighted.sum(), torch.ones_like(weight[0]).int() * batch.real_tokens, sums",
        STAGE2,
    ),
    Mutant(
        "loss: divisor off by one a micro-batch", STEP,
        "return weighted.sum(), weight.sum().int(), sums",
        "return weighted.sum(), weight.sum().int() + 1, sums",
        STAGE1,
    ),
    Mutant(
        "loss: gradients are not divided by the tokens", STEP,
        "stage.config.finalize_model_grads_func = finalize_model_grads",
        "stage.config.finalize_model_grads_func = lambda *_, **__: model.finish_grad_sync()",
        STAGE2,
    ),
    Mutant(
        "loss: reported as the mean over positions", STEP,
        "sums[1].index_add_(0, index, weight.double())",
        "sums[1].index_add_(0, index, torch.ones_like(weight).double() * 2)",
        STAGE2,
    ),
]  # fmt: skip

OPTIMIZATION = [
    Mutant(
        "layer-wise decay: not applied", OPTIMIZER,
        'if "vit" in config.train.frozen or optimizer.vit_layer_decay == 1.0:', "if True:", STAGE1,
    ),
    Mutant(
        "layer-wise decay: the floor of the cosine is not decayed", OPTIMIZER,
        "min_lr=optimizer.min_lr * multiplier", "min_lr=optimizer.min_lr", STAGE1,
    ),
    Mutant(
        "layer-wise decay: the peak is not decayed", OPTIMIZER,
        "max_lr=optimizer.lr * multiplier", "max_lr=optimizer.lr", STAGE1,
    ),
    Mutant(
        "layer-wise decay: patches and positions left out", OPTIMIZER,
        "range(1, config.model.vision.layers + 1)", "range(1, config.model.vision.layers)", STAGE1,
    ),
    Mutant(
        "layer-wise decay: one layer too deep", LAYERS,
        "return model.vision.layers - 1 - layer.index", "return model.vision.layers - layer.index", STAGE2,
    ),
    Mutant(
        "layer-wise decay: counted from the pixels", LAYERS,
        "return model.vision.layers - 1 - layer.index", "return layer.index", STAGE2,
    ),
    Mutant(
        "layer-wise decay: local to the pipeline stage", OPTIMIZER,
        "vit_depth_from_adapter(layer_of(key), config.model)",
        "vit_depth_from_adapter(layer_of(key), config.model) if stage.adapter else 0",
        TENSOR_PARALLEL,
    ),
    Mutant(
        "weight decay: none", OPTIMIZER,
        "start_wd=settings.weight_decay,\n            end_wd=settings.weight_decay,",
        "start_wd=0.0,\n            end_wd=0.0,",
        STAGE1,
    ),
    Mutant("weight decay: of 1-D parameters too", OPTIMIZER, "wd_mult=0.0", "wd_mult=1.0", STAGE1),
    Mutant(
        "weight decay: of no matrix", OPTIMIZER,
        "fn=lambda parameter: parameter.dim() == 1", "fn=lambda parameter: parameter.dim() <= 2", STAGE2,
    ),
    Mutant(
        "weight decay: as L2 regularisation", ADAMW,
        'torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])',
        'torch._foreach_add_(grads, params, alpha=group["weight_decay"])',
        STAGE1,
    ),
    Mutant("weight decay: with the peak's rate", ADAMW,
        'torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])',
        'torch._foreach_mul_(params, 1 - group["max_lr"] * group["weight_decay"])',
        STAGE1,
    ),
    Mutant("AdamW: beta1", OPTIMIZER, "adam_beta1=settings.beta1", "adam_beta1=settings.beta2", STAGE1),
    Mutant("AdamW: beta2", OPTIMIZER, "adam_beta2=settings.beta2", "adam_beta2=0.999", STAGE1),
    Mutant("AdamW: epsilon", OPTIMIZER, "adam_eps=settings.eps", "adam_eps=1e-8", STAGE1),
    Mutant(
        "AdamW: no correction of the second moment", ADAMW,
        '(1 - beta2 ** group["step"]) ** 0.5', "1.0", STAGE3,
    ),
    Mutant(
        "AdamW: no correction of the first moment", ADAMW,
        'group["lr"] / (1 - beta1 ** group["step"])', 'group["lr"]', STAGE3,
    ),
    Mutant("schedule: linear", OPTIMIZER, 'lr_decay_style="cosine"', 'lr_decay_style="linear"', STAGE3),
    Mutant(
        "schedule: no warm-up", OPTIMIZER,
        "lr_warmup_steps=settings.warmup_steps", "lr_warmup_steps=0", STAGE3,
    ),
    Mutant(
        "schedule: warm-up from the floor", OPTIMIZER, "init_lr=0.0", "init_lr=settings.min_lr", STAGE3,
    ),
    Mutant(
        "schedule: one step late", OPTIMIZER,
        "self._scheduler, step + 1)", "self._scheduler, step)", STAGE3,
    ),
    Mutant(
        "schedule: cosine over steps and warm-up", OPTIMIZER,
        "lr_decay_steps=config.train.steps",
        "lr_decay_steps=config.train.steps + settings.warmup_steps",
        STAGE3,
    ),
    Mutant(
        "schedule: cosine to zero", OPTIMIZER,
        "min_lr=settings.min_lr,\n        weight_decay", "min_lr=0.0,\n        weight_decay", STAGE3,
    ),
    Mutant("clipping: none", ENGINE_OPTIMIZER, "if clip_grad > 0.0:", "if clip_grad < 0.0:", STAGE1),
    Mutant("clipping: at a limit of zero", ENGINE_OPTIMIZER, "if clip_grad > 0.0:", "if clip_grad >= 0.0:", OFF),
    Mutant("clipping: at twice the norm", ENGINE_OPTIMIZER, "max_norm=clip_grad", "max_norm=2 * clip_grad", STAGE1),
    Mutant("clipping: at 1.0 always", ENGINE_OPTIMIZER, "max_norm=clip_grad", "max_norm=1.0", STAGE1),
    Mutant(
        "clipping: norm of this rank's gradients alone", ENGINE_OPTIMIZER,
        "norm = float(optimizer.get_grad_norm())",
        "norm = float(sum(float(p.grad.norm()) ** 2 for p in optimizer.get_parameters() if p.grad is not None) ** 0.5)",
        DATA_PARALLEL,
    ),
    Mutant(
        "clipping: tensor-parallel weights of one rank only", FRESH,
        'if not hasattr(module.weight, "tensor_model_parallel"):', "if False:", TENSOR_PARALLEL,
    ),
    Mutant(
        "sequence parallelism: gradients of norms are not summed", SPECS,
        "dtype=config.params_dtype)\n        for parameter in norm.parameters():\n"
        "            parameter.sequence_parallel = config.sequence_parallel",
        "dtype=config.params_dtype)\n        for parameter in norm.parameters():\n"
        "            parameter.sequence_parallel = False",
        TENSOR_PARALLEL,
    ),
    Mutant(
        "bf16: gradients are summed in bf16", STEP,
        "grad_reduce_in_fp32=True", "grad_reduce_in_fp32=False", PRECISION,
    ),
    Mutant(
        "frozen: the decoder is trained in stage 1", RECIPES,
        'train=TrainConfig(steps=50_000, frozen=("decoder",)', "train=TrainConfig(steps=50_000, frozen=()", STAGE1,
    ),
    Mutant(
        "frozen: nothing", FRESH,
        "parameter.requires_grad_(not is_frozen(key, config.train.frozen))", "parameter.requires_grad_(True)", STAGE3,
    ),
    Mutant(
        "frozen: the adapter's output in stage 3", LAYERS,
        'or ("adapter_output" in frozen and is_adapter_output(key))', "or is_adapter_output(key)", STAGE3,
    ),
    Mutant(
        "frozen: patches and positions are trained", LAYERS,
        'if self.kind in ("patch_embed", "vit"):', 'if self.kind in ("vit",):', STAGE3,
    ),
]  # fmt: skip

NUMBERS = [
    Mutant(f"numbers: {old.partition(chr(10))[0]} as {new.partition(chr(10))[0]}", file, old, new, TABLES)
    for file, old, new in (
        (RECIPES, "lr=2e-4", "lr=2e-5"),
        (RECIPES, "min_lr=1e-5, warmup_steps=400", "min_lr=1e-6, warmup_steps=400"),
        (RECIPES, "warmup_steps=3000", "warmup_steps=300"),
        (RECIPES, "warmup_steps=500, vit_layer_decay=0.95", "warmup_steps=500, vit_layer_decay=0.9"),
        (RECIPES, "steps=19_000, frozen=()", 'steps=19_000, frozen=("vit",)'),
        (RECIPES, "global_batch_size=30720", "global_batch_size=30700"),
        (SCHEMA, "beta2: float = Field(0.98", "beta2: float = Field(0.95"),
        (SCHEMA, "eps: float = Field(1e-6, gt=0)\n    \"\"\"Added", "eps: float = Field(1e-8, gt=0)\n    \"\"\"Added"),
        (SCHEMA, "weight_decay: float = Field(0.05", "weight_decay: float = Field(0.1"),
        (SCHEMA, "clip_grad: float = Field(1.0", "clip_grad: float = Field(0.0"),
        (SCHEMA, "rotary_base: int = Field(10000", "rotary_base: int = Field(1000000"),
    )
]  # fmt: skip
