"""Faults of the decoder families: description, names of tensors, vocabulary."""

from __future__ import annotations

from .mutant import PACKAGE, Mutant

QWEN2 = f"{PACKAGE}/architecture/qwen2.py"
TOWER = f"{PACKAGE}/architecture/tower.py"
MAPPINGS = f"{PACKAGE}/checkpoint/formats/mappings.py"
HF_QWEN2 = f"{PACKAGE}/checkpoint/formats/hf_qwen2.py"
HF_TOKENIZER = f"{PACKAGE}/data/rendering/hf_tokenizer.py"
SPECIAL_TOKENS = f"{PACKAGE}/data/rendering/special_tokens.py"
LOGITS = ("tests/distributed/test_decoders_equal_transformers.py",)
CONVERSION = ("tests/unit/checkpoint/formats/test_qwen2.py",)
COUNTS = ("tests/unit/model/test_qwen2_counts.py",)
BYTES = ("tests/distributed/test_qwen2_layouts.py::test_a_run_holds_the_bytes_that_are_counted",)
_HF_TOKENIZER = "tests/unit/data/rendering/test_hf_tokenizer.py::"
IN_TEXT = (
    f"{_HF_TOKENIZER}test_text_never_becomes_an_added_token",
    f"{_HF_TOKENIZER}test_an_added_token_that_is_in_the_vocabulary_too_is_not_found_in_text",
)
FINGERPRINT = (f"{_HF_TOKENIZER}test_the_fingerprint_knows_what_decides_the_ids",)
SAMPLES = (f"{_HF_TOKENIZER}test_samples_differ_from_qwens_in_the_special_tokens_alone",)
GENERATION = ("tests/distributed/test_long_prompts.py",)

FAMILIES = [
    Mutant(
        "families: every head has its own key", QWEN2,
        "query_groups=decoder.query_groups or decoder.heads", "query_groups=decoder.heads", COUNTS,
    ),
    Mutant(
        "families: one group divides the keys twice", TOWER,
        "self.heads + 2 * self.query_groups", "self.heads + self.query_groups", COUNTS,
    ),
    Mutant(
        "families: groups do not limit tensor parallelism", TOWER,
        "if self.query_groups != self.heads:", "if False:", ("tests/unit/config/test_validate.py",),
    ),
    Mutant(
        "families: FLOPs of attention by the width of the stream", f"{PACKAGE}/model/flops.py",
        "first=2 * positions * tower.first_products", "first=2 * positions * 3 * tower.hidden**2", COUNTS,
    ),
    Mutant(
        "families: masters are not counted", f"{PACKAGE}/model/shapes.py",
        "12 if has_master else 8", "8 if has_master else 12", BYTES,
    ),
    Mutant(
        "families: gate and projection swapped", HF_QWEN2,
        '("mlp.gate_proj.weight", "mlp.up_proj.weight")', '("mlp.up_proj.weight", "mlp.gate_proj.weight")', LOGITS,
    ),
    Mutant(
        "families: keys and values swapped", HF_QWEN2,
        '"self_attn.k_proj.{kind}", "self_attn.v_proj.{kind}"', '"self_attn.v_proj.{kind}", "self_attn.k_proj.{kind}"',
        LOGITS,
    ),
    Mutant(
        "families: queries are dealt to the groups in turn", MAPPINGS,
        "parts = [part.unflatten(0, (groups, -1)) for part in parts]",
        "parts = [part.unflatten(0, (-1, groups)).transpose(0, 1) for part in parts]",
        LOGITS + CONVERSION,
    ),
    Mutant(
        "families: a sliding window is taken", HF_QWEN2,
        '"sliding_window_used": one_of(False)', '"sliding_window_used": _ANYTHING', CONVERSION,
    ),
    Mutant(
        "families: layers with another attention are taken", HF_QWEN2,
        '"layer_types": _FULL_ATTENTION', '"layer_types": _ANYTHING', CONVERSION,
    ),
    Mutant(
        "families: an export loses the groups", HF_QWEN2,
        '"num_key_value_heads": tower.query_groups', '"num_key_value_heads": decoder.heads',
        CONVERSION,
    ),
    Mutant(
        "families: qwen2 widens the rotary base", QWEN2,
        "extends_context = False", "extends_context = True", GENERATION,
    ),
    Mutant(
        "vocabulary: added tokens are found in text", HF_TOKENIZER,
        '"added_tokens": [], "post_processor"', '"post_processor"', IN_TEXT,
    ),
    Mutant(
        "vocabulary: an added token stays in the vocabulary", HF_TOKENIZER,
        'content["model"]["vocab"] = text_ids', "pass", IN_TEXT,
    ),
    Mutant(
        "vocabulary: the fingerprint does not know the merges", HF_TOKENIZER,
        '("normalizer", "pre_tokenizer", "model", "added_tokens")', '("normalizer", "pre_tokenizer", "added_tokens")',
        FINGERPRINT,
    ),
    Mutant(
        "vocabulary: boxes between the tokens of references", SPECIAL_TOKENS,
        'box=("<|box_start|>", "<|box_end|>")', 'box=("<|object_ref_start|>", "<|object_ref_end|>")', SAMPLES,
    ),
]  # fmt: skip
