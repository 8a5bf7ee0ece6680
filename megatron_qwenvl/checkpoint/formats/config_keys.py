"""Keys of published configurations: one list of names for all kinds of configuration."""

from __future__ import annotations

import re

NAMES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "layers", "depth"),
    "width": ("hidden_size", "n_embd", "width", "d_model", "embed_dim"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "heads"),
    "head_width": ("kv_channels", "head_dim", "head_width", "attention_head_dim"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_query_groups", "multi_query_group_num"),
    "mlp": ("intermediate_size", "ffn_hidden_size", "n_inner", "mlp_dim"),
    "mlp_ratio": ("mlp_ratio",),
    "patch": ("patch_size",),
    "channels": ("num_channels", "in_channels", "in_chans"),
    "norm_eps": (
        "layer_norm_epsilon", "layernorm_epsilon", "layer_norm_eps", "rms_norm_eps", "norm_epsilon", "norm_eps",
        "epsilon", "eps",
    ),
    "norm": ("norm_layer", "norm_type", "normalization", "norm"),
    "rms": ("use_rmsnorm", "use_rms_norm", "rmsnorm", "rms_norm"),
    "activation": (
        "hidden_act", "activation", "activation_function", "hidden_activation", "mlp_activation", "act_layer",
        "act_fn", "act",
    ),
    "approximate": ("approximate", "gelu_approximate"),
    "quick_gelu": ("quick_gelu", "use_quick_gelu"),
    "positions": ("pos_emb", "position_embedding_type", "pos_embed_type"),
    "rotary_base": ("rotary_emb_base", "rope_theta", "rotary_base", "rope_base"),
    "rotary_share": ("rotary_pct", "rotary_percent", "partial_rotary_factor"),
    "rope_type": ("rope_type",),
    "rope_scaling": ("rope_scaling",),
    "no_bias": ("no_bias",),
    "bias": ("bias", "use_bias", "mlp_bias"),
    "qkv_bias": ("qkv_bias", "use_qkv_bias", "add_qkv_bias", "attention_bias", "attn_bias"),
    "scaled_scores": ("scale_attn_weights",),
    "residual": ("apply_residual_connection_post_layernorm", "post_norm", "use_post_norm"),
    "layer_scale": ("ls_init_value", "layer_scale_init_value", "layerscale_value", "init_values"),
    "no_ln_pre": ("no_ln_pre",),
    "other_blocks": (
        "timm_model_name", "block_type", "input_patchnorm", "qk_norm", "scaled_cosine_attn", "scale_heads",
        "scale_attn", "scale_fc", "eva_model_name",
    ),
    "mean": ("image_mean", "mean"),
    "deviation": ("image_std", "std"),
    "model_type": ("model_type",),
    "architectures": ("architectures",),
    "tied": ("tie_word_embeddings",),
    "sliding_window_used": ("use_sliding_window",),
    "sliding_window_sizes": ("sliding_window", "max_window_layers"),
    "layer_types": ("layer_types",),
    "other_positions": ("use_mrope", "mrope_section"),
}  # fmt: skip
"""Subjects that a configuration states about the computation, with their names, new and old; the first is Qwen's."""

SUBJECTS = {name: subject for subject, names in NAMES.items() for name in names}
"""Subject of each name."""

NESTED = ("act_kwargs", "norm_kwargs", "rope_parameters")
"""Keys of nested objects whose keys are compared as if they stood outside."""

HARMLESS = frozenset({
    # the file itself, its types and its training
    "attention_dropout", "attention_probs_dropout_prob", "attn_dropout_prob", "attn_pdrop", "auto_map",
    "bf16", "bias_dropout_fusion", "chunk_size_feed_forward", "classifier_dropout", "drop_path", "drop_path_rate",
    "dropout", "dtype", "emb_dropout_prob", "embd_pdrop", "finetuning_task", "fp16", "fp32", "gradient_checkpointing",
    "hidden_dropout", "hidden_dropout_prob", "initializer_factor", "initializer_range", "name_or_path", "onnx_safe",
    "params_dtype", "patch_dropout", "resid_pdrop", "torch_dtype", "torchscript", "transformers_version",
    "use_bfloat16", "use_flash_attn", "attn_implementation", "apply_query_key_layer_scaling",
    "attention_softmax_in_fp32", "softmax_in_fp32", "elementwise_affine", "inplace", "cast_dtype",
    # lengths, vocabulary and tokens
    "bos_token_id", "cls_token_id", "decoder_start_token_id", "eos_token_id", "max_position_embeddings",
    "max_window_size",
    "model_max_length", "n_ctx", "n_positions", "pad_token_id", "padded_vocab_size", "prefix", "sep_token_id",
    "seq_length", "tokenizer_class", "tokenizer_type", "use_dynamic_ntk", "use_logn_attn", "vocab_size",
    # caches of the generation, settings of the generation and of tasks, which old files repeat in every section
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "top_k", "top_p",
    "typical_p", "use_cache", "use_cache_kernel", "use_cache_quantization",
    # what of a ViT is not imported, or what its tensors' shapes show
    "attentional_pool", "attn_pooler_heads", "attn_pooler_queries", "custom_text", "final_ln_after_pool", "image_size",
    "init_logit_bias", "init_logit_scale", "logit_scale_init_value", "multimodal_cfg", "nonscalar_logit_scale",
    "output_dict", "output_tokens", "pool_type", "projection_dim", "text_cfg", "text_config", "text_config_dict",
})  # fmt: skip
"""Keys that do not affect what is imported, whatever their value."""

_COMPUTES = re.compile(
    r"(^|_)act(_|$)|activation|(ge|re|si|swi|g)lu|(^|_)rope|rotary|theta|alibi|window|softcap|scal(e|ing|ar)|multiplier"
    r"|norm|(^|_)ln_|(^|_)eps(_|$)|epsilon|quant|bias|parallel_(attn|attention|block|mlp|residual)|(^|_)moe|expert"
    r"|residual|pos_emb|position_emb|(^|_)heads?(_|$)|mean$|std$"
)


def computes(key: str, value: object) -> bool:
    """Whether an unknown key, judged by its name, switches on something that changes what a model computes."""
    return bool(_COMPUTES.search(key.lower())) and "checkpoint" not in key and not is_off(value)


def is_off(value: object) -> bool:
    """Whether a value switches nothing on."""
    return value is None or value is False or value == 0 or value in ("", "none") or value in ([], {})
