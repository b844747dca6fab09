"""Whether the forward takes the way of an accelerator: so that a plan can follow it without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_PRETENDED = ContextVar("pretended", default=False)


def accelerated(device: torch.device) -> bool:
    """Fused attention, and large chunks of logits: on an accelerator, or where one is pretended."""
    return device.type != "cpu" or _PRETENDED.get()


@contextlib.contextmanager
def as_on_an_accelerator(pretended: bool = True) -> Iterator[None]:
    """Inside, tensors on the CPU (of shapes alone) go the way that they would go on an accelerator."""
    token = _PRETENDED.set(pretended)
    try:
        yield
    finally:
        _PRETENDED.reset(token)
