"""Pipeline messages without the gradients that nobody needs.

Relies on every message of the pipeline schedules going through `P2PCommunicator._communicate`, whose
keywords `tensor_send_prev` and `recv_next` carry the gradients. Held by `tests/unit/engine/test_communicator.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.transformer_config import TransformerConfig


class FrozenPrefixCommunicator(P2PCommunicator):
    """Drops gradient messages over boundaries below which nothing is trained.

    Both sides of a boundary drop the message; dropping it on one side only would deadlock. The model detaches
    what it receives over such a boundary.

    Args:
        trained_before: a layer on an earlier pipeline stage is trained.
        trained_through: a layer on this or an earlier pipeline stage is trained.
    """

    def __init__(
        self,
        pp_group: torch.distributed.ProcessGroup,
        config: TransformerConfig,
        trained_before: bool,
        trained_through: bool,
    ) -> None:
        super().__init__(pp_group=pp_group, config=config)
        self._trained_before = trained_before
        self._trained_through = trained_through
        self.gradients_received = 0
        """Gradient messages received so far."""

    def _communicate(self, *, tensor_send_prev: Any, recv_next: bool, **kwargs: Any) -> Any:
        if not self._trained_before:
            tensor_send_prev = None
        if not self._trained_through:
            recv_next = False
        self.gradients_received += int(recv_next)
        return super()._communicate(tensor_send_prev=tensor_send_prev, recv_next=recv_next, **kwargs)
