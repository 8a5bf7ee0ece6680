"""Family `qwen2` in the Hugging Face format: Qwen2 and Qwen2.5 with an untied output layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megatron_qwenvl.architecture.model import family_of
from megatron_qwenvl.architecture.tower import Tower
from megatron_qwenvl.checkpoint.storage.manifest import HFMetadata
from megatron_qwenvl.config.schema import DecoderConfig, Family

from .config_comparison import Expected, one_of
from .config_keys import NAMES
from .hf_decoder import HFDecoder

_FULL_ATTENTION = Expected(
    '"full_attention" for every layer',
    lambda found: isinstance(found, list) and all(kind == "full_attention" for kind in found),
)
_ANYTHING = Expected("anything", lambda found: True)
_TRAINED_LENGTH = 32768


class HFQwen2(HFDecoder):
    """Names and keys of Qwen2.5-7B."""

    states_head_size: ClassVar[bool] = False
    """Whether `config.json` has the key `head_dim` (Qwen3); without it a head has `hidden_size / num_attention_heads`
    channels."""
    family: ClassVar[Family] = "qwen2"
    model_type = "qwen2"
    class_part = "Qwen2"
    embedding = "model.embed_tokens.weight"
    final_norm = "model.norm.weight"
    output_layer = "lm_head.weight"
    layers = "model.layers."
    layer_tensors = {  # noqa: RUF012 - a constant
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    qkv = ("self_attn.q_proj.{kind}", "self_attn.k_proj.{kind}", "self_attn.v_proj.{kind}")
    gate_and_up = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    needed = ("heads", "kv_heads", "norm_eps", "rotary_base")
    defaults = {  # noqa: RUF012 - transformers' `Qwen2Config` without arguments
        "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "hidden_act": "silu", "use_sliding_window": False, "tie_word_embeddings": False,
    }  # fmt: skip
    image_start = 151652
    tokenizer_file = "tokenizer.json"
    pretrained_model = "Qwen2.5-7B"
    chat_model = "Qwen2.5-7B-Instruct"
    kept = (
        "attention_dropout", "bos_token_id", "eos_token_id", "initializer_range", "max_window_layers",
        "pad_token_id", "sliding_window", "tokenizer_class", "use_cache",
    )  # fmt: skip

    def expected(self, tower: Tower) -> dict[str, Expected]:
        """Attention over a window is off; its sizes are then of no concern."""
        return {
            "sliding_window_used": one_of(False),
            "sliding_window_sizes": _ANYTHING,
            "layer_types": _FULL_ATTENTION,
        }

    def read_context(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The length up to which positions were trained."""
        length = config.get("max_position_embeddings")
        return {**_PLAIN_POSITIONS, "seq_length": _TRAINED_LENGTH if length is None else length}

    def new_metadata(self) -> HFMetadata:
        """Qwen2.5's."""
        return HFMetadata(seq_length=_TRAINED_LENGTH, **_PLAIN_POSITIONS)

    def read_groups(self, config: Mapping[str, Any]) -> int | None:
        """Key and value heads."""
        return next((config[name] for name in NAMES["kv_heads"] if config.get(name) is not None), None)

    def config(self, decoder: DecoderConfig, dtype: str, hf_metadata: HFMetadata) -> dict[str, Any]:
        """`config.json` by which transformers loads the decoder."""
        tower = family_of(decoder).tower(decoder)
        return {
            "architectures": [f"{self.class_part}ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
            "initializer_range": 0.02,
            "model_type": self.model_type,
            "torch_dtype": dtype,
            "use_cache": True,
            "vocab_size": decoder.vocab_size,
            **{key: hf_metadata.config[key] for key in self.kept if key in hf_metadata.config},
            **({"head_dim": tower.head_size} if self.states_head_size else {}),
            "hidden_act": "silu",
            "hidden_size": decoder.hidden,
            "intermediate_size": decoder.ffn_hidden,
            "max_position_embeddings": hf_metadata.seq_length,
            "num_attention_heads": decoder.heads,
            "num_hidden_layers": decoder.layers,
            "num_key_value_heads": tower.query_groups,
            "rms_norm_eps": decoder.norm_eps,
            "rope_theta": float(decoder.rotary_base),
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        }

    def generation(self, chat: bool) -> dict[str, Any]:
        """The settings of Qwen2.5-7B-Instruct (sampling) or Qwen2.5-7B (greedy), with a chat format as in Qwen-VL's."""
        common = {"bos_token_id": 151643, "pad_token_id": 151643}
        if chat:
            sampling = {
                "do_sample": True,
                "repetition_penalty": 1.05,
                "temperature": 0.7,
                "top_k": 20,
                "top_p": 0.8,
            }
            return {**common, "chat_format": "chatml", "eos_token_id": [151645, 151643], **sampling}
        greedy = {"do_sample": False, "max_new_tokens": 2048}
        return {**common, "chat_format": "raw", "eos_token_id": 151643, **greedy}


_PLAIN_POSITIONS: dict[str, Any] = {"use_dynamic_ntk": False, "use_logn_attn": False}
"""Qwen2 has no extension at inference by default."""
