"""Family `qwen` in the Hugging Face format: Qwen-7B, and the decoder of the published Qwen-VL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megatron_qwenvl.architecture.model import family_of
from megatron_qwenvl.architecture.tower import Tower
from megatron_qwenvl.checkpoint.storage.manifest import HFMetadata
from megatron_qwenvl.config.schema import DecoderConfig, Family

from .config_comparison import Expected, one_of
from .hf_decoder import HFDecoder

_AUTO_MAP = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
}
"""The published code, in files beside the weights, which import other files of the published directory."""


class HFQwen(HFDecoder):
    """Names and keys of Qwen-7B."""

    family: ClassVar[Family] = "qwen"
    model_type = "qwen"
    class_part = "QWen"
    embedding = "transformer.wte.weight"
    final_norm = "transformer.ln_f.weight"
    output_layer = "lm_head.weight"
    layers = "transformer.h."
    layer_tensors = {  # noqa: RUF012 - a constant
        "self_attention.linear_qkv.layer_norm_weight": "ln_1.weight",
        "self_attention.linear_proj.weight": "attn.c_proj.weight",
        "mlp.linear_fc1.layer_norm_weight": "ln_2.weight",
        "mlp.linear_fc2.weight": "mlp.c_proj.weight",
    }
    qkv = ("attn.c_attn.{kind}",)
    gate_and_up = ("mlp.w2.weight", "mlp.w1.weight")  # c_proj(w1(x) * silu(w2(x)))
    mlp_factor = 2
    needed = ("heads", "norm_eps", "rotary_base")
    image_start = 151857
    tokenizer_file = "qwen.tiktoken"
    pretrained_model = "Qwen-VL"
    chat_model = "Qwen-VL-Chat"
    code_files = tuple(f"{place.split('.')[0]}.py" for place in _AUTO_MAP.values())
    kept = (
        "attn_dropout_prob", "bos_token_id", "emb_dropout_prob", "eos_token_id", "initializer_range",
        "max_position_embeddings", "onnx_safe", "pad_token_id", "softmax_in_fp32", "tokenizer_class",
        "tokenizer_type", "use_cache", "use_cache_kernel", "use_cache_quantization", "use_flash_attn",
    )  # fmt: skip

    def expected(self, tower: Tower) -> dict[str, Expected]:
        """The switch that turns off all biases but those of QKV."""
        return {"no_bias": one_of(not tower.bias)}

    def read_context(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Length and both measures beyond it."""
        names = ("seq_length", "use_dynamic_ntk", "use_logn_attn")
        return {name: config[name] for name in names if name in config}

    def new_metadata(self) -> HFMetadata:
        """The published Qwen-VL's."""
        return HFMetadata()

    def read_groups(self, config: Mapping[str, Any]) -> int | None:
        """None: every head has its own key and value."""
        return None

    def config(self, decoder: DecoderConfig, dtype: str, hf_metadata: HFMetadata) -> dict[str, Any]:
        """`config.json` for the published `QWenLMHeadModel` code."""
        return {
            "architectures": ["QWenLMHeadModel"],
            "auto_map": _AUTO_MAP,
            "attn_dropout_prob": 0.0,
            "bf16": dtype == "bfloat16",
            "emb_dropout_prob": 0.0,
            "fp16": dtype == "float16",
            "fp32": dtype == "float32",
            "initializer_range": 0.02,
            "max_position_embeddings": 8192,
            "model_type": self.model_type,
            "onnx_safe": None,
            "scale_attn_weights": True,
            "seq_length": hf_metadata.seq_length,
            "tokenizer_type": "QWenTokenizer",
            "torch_dtype": dtype,
            "use_cache": True,
            "use_dynamic_ntk": hf_metadata.use_dynamic_ntk,
            "use_flash_attn": "auto",
            "use_logn_attn": hf_metadata.use_logn_attn,
            "vocab_size": decoder.vocab_size,
            **{key: hf_metadata.config[key] for key in self.kept if key in hf_metadata.config},
            "hidden_size": decoder.hidden,
            "intermediate_size": self.mlp_factor * decoder.ffn_hidden,
            "kv_channels": family_of(decoder).tower(decoder).head_size,
            "layer_norm_epsilon": decoder.norm_eps,
            "no_bias": True,
            "num_attention_heads": decoder.heads,
            "num_hidden_layers": decoder.layers,
            "rotary_emb_base": decoder.rotary_base,
            "rotary_pct": 1.0,
            "tie_word_embeddings": False,
        }

    def generation(self, chat: bool) -> dict[str, Any]:
        """The settings of Qwen-VL-Chat (ChatML, sampling) or of the pre-trained Qwen-VL (plain text, greedy)."""
        common = {
            "eos_token_id": 151643,
            "max_new_tokens": 512,
            "max_window_size": 6144,
            "pad_token_id": 151643,
        }
        if chat:
            return {**common, "chat_format": "chatml", "do_sample": True, "top_k": 0, "top_p": 0.3}
        return {**common, "chat_format": "raw", "do_sample": False, "stop_words_ids": [[151643]]}
