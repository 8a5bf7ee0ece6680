"""Faults of the model and of its fresh weights."""

from __future__ import annotations

from .mutant import FULL_SIZE, PACKAGE, STAGE1, STAGE2, STAGE3, TENSOR_PARALLEL, Mutant

ENGINE_CONFIG = f"{PACKAGE}/model/engine_config.py"
FRESH = f"{PACKAGE}/model/build.py"
SPECS = f"{PACKAGE}/model/specs.py"
STAGE = f"{PACKAGE}/model/stage.py"
FRESH_WEIGHTS = ("tests/recipe/test_fresh_weights.py",)

MODEL = [
    Mutant(
        "ViT: epsilon", f"{PACKAGE}/architecture/vit.py",
        "norm_eps=vision.norm_eps", "norm_eps=1e-5", STAGE1 + FULL_SIZE,
    ),
    Mutant(
        "ViT: epsilon of ln_pre", f"{PACKAGE}/model/patch_embedding.py",
        "nn.LayerNorm(vision.width, eps=vision.norm_eps", "nn.LayerNorm(vision.width, eps=1e-5",
        STAGE1 + FULL_SIZE,
    ),
    Mutant(
        "adapter: epsilon", f"{PACKAGE}/model/adapter.py",
        "hidden, eps = model.decoder.hidden, model.adapter.norm_eps", "hidden, eps = model.decoder.hidden, 1e-5",
        STAGE1 + FULL_SIZE,
    ),
    Mutant(
        "decoder: epsilon", f"{PACKAGE}/architecture/qwen.py",
        "norm_eps=decoder.norm_eps", "norm_eps=1e-5", STAGE1 + FULL_SIZE,
    ),
    Mutant(
        "ViT: epsilon of ln_pre in full size alone", f"{PACKAGE}/model/patch_embedding.py",
        "nn.LayerNorm(vision.width, eps=vision.norm_eps",
        "nn.LayerNorm(vision.width, eps=1e-5 if vision.width == 1664 else vision.norm_eps",
        FULL_SIZE,
    ),
    Mutant(
        "ViT: GELU by tanh", ENGINE_CONFIG,
        "else F.gelu,",
        'else lambda x: F.gelu(x, approximate="tanh"),',
        STAGE1,
    ),
    Mutant("dropout", ENGINE_CONFIG, '"hidden_dropout": 0.0', '"hidden_dropout": 0.1', STAGE1 + FULL_SIZE),
    Mutant(
        "rotary base", STAGE, "float(tower.rotary_base)", "1e6", STAGE3,
    ),
    Mutant(
        "rotary positions of odd and even channels", f"{PACKAGE}/model/positions.py",
        "return torch.cat([angles, angles], dim=-1)",
        "return angles.repeat_interleave(2, dim=-1)", STAGE3,
    ),
    Mutant(
        "attention: scaled queries", SPECS,
        "q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))",
        "q, k, v = (x.permute(1, 2, 0, 3) for x in (query * 1.01, key, value))", STAGE3,
    ),
    Mutant(
        "attention: ViT is causal", STAGE, '"vit", causal=False', '"vit", causal=True', STAGE1,
    ),
    Mutant(
        "positions: bilinear", f"{PACKAGE}/model/positions.py", 'mode="bicubic"', 'mode="bilinear"', STAGE2,
    ),
    Mutant(
        "positions: corners aligned", f"{PACKAGE}/model/positions.py",
        "align_corners=False)", "align_corners=True)", STAGE2,
    ),
    Mutant(
        "positions: rows before columns", f"{PACKAGE}/model/positions.py",
        "torch.cat([columns, rows], dim=2)", "torch.cat([rows, columns], dim=2)", STAGE1,
    ),
    Mutant(
        "adapter: positions on values too", f"{PACKAGE}/model/adapter.py",
        "v = self.linear_v(kv)[0]", "v = self.linear_v(kv + keys_table)[0]", STAGE1,
    ),
    Mutant(
        "adapter: no positions on queries", f"{PACKAGE}/model/adapter.py",
        "query = self.ln_q(self.query) + table.to(patches.dtype)", "query = self.ln_q(self.query)", STAGE1,
    ),
]  # fmt: skip

INITIALIZATION = [
    Mutant(
        "fresh weights: residual projections not scaled", FRESH,
        "return model.init_std / (2 * layers) ** 0.5 if into_residual else model.init_std",
        "return model.init_std", FRESH_WEIGHTS,
    ),
    Mutant(
        "fresh weights: residual projections scaled by layers alone", FRESH,
        "model.init_std / (2 * layers) ** 0.5", "model.init_std / layers**0.5", FRESH_WEIGHTS,
    ),
    Mutant(
        "fresh weights: the other tower's layers", FRESH,
        'if layer_of(key).kind == "vit" else', 'if layer_of(key).kind != "vit" else', FRESH_WEIGHTS,
    ),
    Mutant(
        "fresh weights: only the MLP's projection scaled", FRESH,
        'key.endswith((".linear_proj.weight", ".linear_fc2.weight"))', 'key.endswith(".linear_fc2.weight")',
        FRESH_WEIGHTS,
    ),
    Mutant("fresh weights: queries", FRESH, "trunc_normal_(tensor, std=0.02", "trunc_normal_(tensor, std=1.0",
        FRESH_WEIGHTS),
    Mutant(
        "fresh weights: positions", FRESH, "return 0.5\n", "return model.init_std\n", FRESH_WEIGHTS,
    ),
    Mutant(
        "fresh weights: the same numbers in all tensors", FRESH, 'f"{seed}:{key}"', 'f"{seed}"', FRESH_WEIGHTS,
    ),
    Mutant(
        "fresh weights: no seed", FRESH, 'f"{seed}:{key}"', 'f"{key}"', FRESH_WEIGHTS,
    ),
    Mutant(
        "fresh weights: shards drawn apart", FRESH,
        "full = fresh_tensor(key, shard.global_shape, model, seed)",
        "full = fresh_tensor(key, shard.global_shape, model, seed + sum(shard.global_offset))",
        TENSOR_PARALLEL,
    ),
]  # fmt: skip
