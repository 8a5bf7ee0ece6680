"""Rules: which tensors of the Hugging Face format hold the weights of which megatron tensors."""

from __future__ import annotations

from dataclasses import dataclass

from .mappings import Identity, Mapping

_IDENTITY = Identity()


@dataclass(frozen=True)
class Rule:
    """Names of tensors that hold the same weights in both formats, and the mapping between them."""

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    mapping: Mapping = _IDENTITY


def identity_rules(table: dict[str, str], megatron: str, hf: str) -> list[Rule]:
    """Rules for tensors that both formats store in the same way; names get the prefixes `megatron` and `hf`."""
    return [Rule((megatron + key,), (hf + hf_key,)) for key, hf_key in table.items()]
