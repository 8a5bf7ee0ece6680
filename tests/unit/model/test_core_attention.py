"""Contract: megatron-core calls a core attention as it calls its own."""

from __future__ import annotations

import inspect

from megatron.core.transformer.dot_product_attention import DotProductAttention

from megatron_qwenvl.model.specs import ScaledDotProductAttention


def test_core_attention_takes_what_megatron_core_passes() -> None:
    theirs, ours = (
        [
            (argument.name, argument.default)
            for argument in inspect.signature(kind.forward).parameters.values()
        ]
        for kind in (DotProductAttention, ScaledDotProductAttention)
    )
    assert ours == theirs
    own = inspect.signature(ScaledDotProductAttention.__init__).parameters
    named = [name for name, argument in own.items() if argument.kind is not argument.VAR_KEYWORD]
    assert named == list(inspect.signature(DotProductAttention.__init__).parameters)[: len(named)]
