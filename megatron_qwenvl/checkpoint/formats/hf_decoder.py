"""A decoder family in the Hugging Face format: names of its tensors, and keys of its configuration.

A family is a subclass in a file of its own (`hf_qwen.py`, `hf_qwen2.py`) and an entry of `hf_families.py`. What the
decoder computes is taken from its description (`architecture/`); the subclass adds the names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from megatron_qwenvl.architecture.model import family_of
from megatron_qwenvl.architecture.tower import Tower
from megatron_qwenvl.checkpoint.storage.manifest import HFMetadata
from megatron_qwenvl.config.schema import DecoderConfig, Family

from .config_comparison import Compared, Expected, compare_section, named_classes, not_said, one_of
from .config_keys import SUBJECTS
from .mappings import InterleavedHeads, PaddedRows, Stacked
from .rules import Rule, identity_rules


class HFDecoder(ABC):
    """Names and keys of one family."""

    family: ClassVar[Family]
    """The family."""
    model_type: ClassVar[str]
    """Key `model_type` of its `config.json`."""
    class_part: ClassVar[str]
    """Part of the name of every class in `architectures`."""
    embedding: ClassVar[str]
    """Tensor of the word embedding."""
    final_norm: ClassVar[str]
    """Tensor of the norm after the last layer."""
    output_layer: ClassVar[str]
    """Tensor of the output layer."""
    layers: ClassVar[str]
    """Prefix of the number of a layer in the names of its tensors."""
    layer_tensors: ClassVar[dict[str, str]]
    """Tensors of a layer that both formats store in the same way, megatron name to hf name."""
    qkv: ClassVar[tuple[str, ...]]
    """The tensor, or the three tensors, of query, key and value; `{kind}` stands for weight or bias."""
    gate_and_up: ClassVar[tuple[str, str]]
    """Tensors of the activated projection and of the one that it is multiplied with."""
    mlp_factor: ClassVar[int] = 1
    """`intermediate_size` for each channel of the MLP."""
    needed: ClassVar[tuple[str, ...]]
    """Subjects (`config_keys.NAMES`) that a configuration must state, as shapes of tensors do not show them."""
    defaults: ClassVar[dict[str, object]] = {}
    """Meaning of a key that is absent; for a key that is neither here nor in the file, the model's value is assumed."""
    image_start: ClassVar[int]
    """Id of the token before an image's slots in the published vocabulary."""
    tokenizer_file: ClassVar[str]
    """Name of its vocabulary file."""
    pretrained_model: ClassVar[str]
    """Name of the model whose `generation_config.json` a pre-trained model gets."""
    chat_model: ClassVar[str]
    """The same of a chat model."""
    code_files: ClassVar[tuple[str, ...]] = ()
    """Files of code that `config.json` names."""
    kept: ClassVar[tuple[str, ...]]
    """Keys of `config.json` that an export gives back. None of them names code."""

    def rules(self, decoder: DecoderConfig) -> list[Rule]:
        """The decoder with its embedding and head."""
        tower = family_of(decoder).tower(decoder)
        ends = {
            "embedding.word_embeddings.weight": self.embedding,
            "decoder.final_layernorm.weight": self.final_norm,
            "output_layer.weight": self.output_layer,
        }
        rules = identity_rules(ends, "", "")
        heads = InterleavedHeads(tower.heads, len(self.qkv), tower.query_groups)
        for i in range(tower.layers):
            megatron, hf = f"decoder.layers.{i}.", f"{self.layers}{i}."
            rules += identity_rules(self.layer_tensors, megatron, hf)
            for kind in ("weight", "bias") if tower.qkv_bias else ("weight",):
                names = tuple(hf + name.format(kind=kind) for name in self.qkv)
                rules.append(Rule((f"{megatron}self_attention.linear_qkv.{kind}",), names, heads))
            gate_and_up = tuple(hf + name for name in self.gate_and_up)
            rules.append(Rule((f"{megatron}mlp.linear_fc1.weight",), gate_and_up, Stacked()))
        return rules

    def padded_rules(self, decoder: DecoderConfig) -> list[Rule]:
        """`rules` for a vocabulary with at most the decoder's rows (import only)."""
        padded, mapping = {self.embedding, self.output_layer}, PaddedRows(decoder.vocab_size)
        return [
            Rule(rule.megatron, rule.hf, mapping) if rule.hf[0] in padded else rule
            for rule in self.rules(decoder)
        ]

    def compare(self, path: Path, config: Mapping[str, Any], decoder: DecoderConfig) -> Compared:
        """Compare a configuration of any age with a decoder; a missing statement becomes a note.

        Args:
            path: its file.
            config: its content.
            decoder: the decoder that is to use the weights.
        """
        tower = family_of(decoder).tower(decoder)
        table = {**self._common_keys(tower), **self.expected(tower)}
        found = compare_section(path, "", config, table, self.defaults, apart=frozenset({"visual"}))
        if decoder.hidden % decoder.heads:
            found.differs(path, "num_attention_heads", f"a divisor of {decoder.hidden}", decoder.heads)
        defaulted = {SUBJECTS[name] for name in self.defaults}
        open_subjects = tuple(subject for subject in self.needed if subject not in defaulted)
        if silent := not_said(found, "", open_subjects):
            found.notes.append(f"note: {path} does not say {', '.join(silent)}: assumed as in the model")
        return found

    def _common_keys(self, tower: Tower) -> dict[str, Expected]:
        """Expected values of the keys that every family has, by subject."""
        return {
            "architectures": named_classes(self.class_part),
            "model_type": one_of(self.model_type),
            "layers": one_of(tower.layers),
            "width": one_of(tower.hidden),
            "heads": one_of(tower.heads),
            "head_width": one_of(tower.head_size),
            "kv_heads": one_of(tower.query_groups),
            "mlp": one_of(self.mlp_factor * tower.ffn_hidden),
            "norm": one_of("rmsnorm", "rms_norm", "RMSNorm"),
            "rms": one_of(True),
            "norm_eps": one_of(tower.norm_eps),
            "activation": one_of("swiglu", "silu", "swish"),
            "positions": one_of("rotary", "rope"),
            "rotary_base": one_of(tower.rotary_base),
            "rotary_share": one_of(1.0),
            "rope_type": one_of("default"),
            "bias": one_of(tower.bias),
            "qkv_bias": one_of(tower.qkv_bias),
            "scaled_scores": one_of(True),
            "residual": one_of(False),
            "tied": one_of(False),
        }

    def expected(self, tower: Tower) -> dict[str, Expected]:
        """Expected values of further keys, by subject."""
        return {}

    @abstractmethod
    def read_context(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Trained length and extension of a `config.json`, as fields of `HFMetadata`; absent: the default."""

    @abstractmethod
    def new_metadata(self) -> HFMetadata:
        """Metadata of weights whose origin is not known."""

    @abstractmethod
    def config(self, decoder: DecoderConfig, dtype: str, hf_metadata: HFMetadata) -> dict[str, Any]:
        """Content of `config.json` without the `visual` section."""

    @abstractmethod
    def generation(self, chat: bool) -> dict[str, Any]:
        """Content of `generation_config.json` for a chat model or a pre-trained one."""

    @abstractmethod
    def read_groups(self, config: Mapping[str, Any]) -> int | None:
        """The field `query_groups` of a `config.json` that states all keys of `needed`."""
