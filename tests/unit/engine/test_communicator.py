"""Contract: every message of a pipeline goes through `_communicate`, with the names that are overridden."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_qwenvl.engine.communicator import FrozenPrefixCommunicator

TENSOR = torch.zeros(1, 1, 1)
SHAPE = (1, 1, 1)


def recording(
    monkeypatch: pytest.MonkeyPatch, trained_before: bool, trained_through: bool
) -> tuple[FrozenPrefixCommunicator, list[dict[str, Any]]]:
    """A communicator of a middle pipeline stage, and the messages that leave it."""
    messages: list[dict[str, Any]] = []

    def communicate(self: Any, **message: Any) -> tuple[Any, Any, None]:
        messages.append(message)
        return TENSOR, TENSOR if message["recv_next"] else None, None

    monkeypatch.setattr(
        P2PCommunicator, "__init__", lambda self, pp_group, config: vars(self).update(config=config)
    )
    monkeypatch.setattr(P2PCommunicator, "_communicate", communicate)
    config = SimpleNamespace(timers=None)
    return FrozenPrefixCommunicator(None, config, trained_before, trained_through), messages  # type: ignore[arg-type]


def send_all(communicator: FrozenPrefixCommunicator) -> None:
    """What the schedule of one forward, one backward does on a middle pipeline stage."""
    communicator.recv_forward(SHAPE, False)
    communicator.send_forward(TENSOR, False)
    communicator.send_forward_recv_backward(TENSOR, SHAPE, False)
    communicator.send_backward_recv_forward(TENSOR, SHAPE, False)
    communicator.recv_backward(SHAPE, False)
    communicator.send_backward(TENSOR, False)


@pytest.mark.parametrize("trained_before", [True, False])
@pytest.mark.parametrize("trained_through", [True, False])
def test_every_gradient_message_goes_through_communicate(
    monkeypatch: pytest.MonkeyPatch, trained_before: bool, trained_through: bool
) -> None:
    communicator, messages = recording(monkeypatch, trained_before, trained_through)
    send_all(communicator)
    assert len(messages) == 6
    assert sum(message["tensor_send_prev"] is not None for message in messages) == 2 * trained_before
    assert sum(message["recv_next"] for message in messages) == 2 * trained_through
    assert communicator.gradients_received == 2 * trained_through
    assert sum(message["recv_prev"] for message in messages) == 2, "activations are not touched"
    assert sum(message["tensor_send_next"] is not None for message in messages) == 2
