"""A newly initialized adapter as a source of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_qwenvl.checkpoint.storage.tensors import TensorSpec
from megatron_qwenvl.config.schema import ModelConfig
from megatron_qwenvl.model.shapes import tensor_shapes


class FreshAdapter:
    """The tensors of a newly initialized adapter, as the model itself would initialize them."""

    def __init__(self, model: ModelConfig, seed: int, dtype: torch.dtype) -> None:
        self._model = model
        self._seed = seed
        self._specs = {
            name: TensorSpec(shape, dtype)
            for name, shape in tensor_shapes(model).items()
            if name.startswith("adapter.")
        }

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Shapes and types of the adapter's tensors."""
        return self._specs

    def read(self, name: str) -> Tensor:
        """Initialize one tensor."""
        from megatron_qwenvl.model.build import (
            fresh_tensor,  # imports the engine, which nothing else here needs
        )

        spec = self._specs[name]
        return fresh_tensor(name, spec.shape, self._model, self._seed).to(spec.dtype)
