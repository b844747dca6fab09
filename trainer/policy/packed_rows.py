"""Whether a model can take several examples in one row: tried on its first batch, with a way round where it cannot."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.layout import altered, picked, separated
from trainer.policy.attention import backend
from trainer.policy.logprobs import completion_logps, unwrap
from trainer.schema import Rows

log = logging.getLogger(__name__)


class PackedRows:
    """Batches as a policy can take them.

    Args:
        base: the policy's name, for the line that says what became of its rows.
        pad_token_id: for rows that have to be padded.

    Attributes:
        taken: whether the policy attends to packed rows as it should; None until it was tried.
    """

    def __init__(self, base: str, pad_token_id: int) -> None:
        self.base, self.pad_token_id = base, pad_token_id
        self.taken: bool | None = None

    def understood(self, batch: Any) -> Any:
        """The batch as it is, or with a padded row for each completion; `try_on` has seen such a batch before."""
        assert batch.rows.segments is None or self.taken is not None
        if batch.rows.segments is None or self.taken:
            return batch
        return dataclasses.replace(batch, rows=separated(batch.rows, self.pad_token_id))

    def describe(self, policy: nn.Module, device: torch.device) -> dict[str, Any]:
        """For the run's manifest: whether packed rows are taken, and what computes their attention."""
        return {
            "packed_rows": self.taken,
            "attention": backend(unwrap(policy).config._attn_implementation, device),
        }

    def try_on(self, policy: nn.Module | None, batch: Any, on_any_rank: Callable[[bool], bool]) -> None:
        """Try packed rows on the first batch that has some; `on_any_rank` asks all ranks."""
        if batch.rows.segments is not None and self.taken is None:
            assert policy is not None
            wrong = packed_rows_differ(policy, batch.rows, self.pad_token_id)
            self.taken = not on_any_rank(wrong is not None)
            if not self.taken:
                log.warning(
                    "%s cannot take several examples in one row (%s): each completion gets a padded row of its own,"
                    " which takes more memory; with data.layout: concatenated the token budget counts the padding",
                    self.base, wrong or "on another rank",
                )  # fmt: skip


_EXACT, _ROUNDED = 2e-3, 0.5
"""Nats for each token that two layouts may differ by: in float32, and where products are rounded further."""
_LEAK = 0.01
"""The share of it by which one layout may move with tokens that must not be seen."""


def _tried(model: nn.Module, rows: Rows) -> tuple[Tensor | None, str]:
    """The completions' log-probs, or what the model says against such rows."""
    try:
        return completion_logps(model, rows)[0], ""
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, NotImplementedError, RuntimeError, KeyError, IndexError) as error:
        said = (str(error).strip().splitlines() or ["it fails"])[0]
        return None, f"{type(error).__name__}: {said[:120]}"


@torch.no_grad()
def packed_rows_differ(model: nn.Module, rows: Rows, pad_token_id: int) -> str | None:
    """What is wrong with a model's log-probs of packed rows; None if nothing is.

    Tried on the shortest and the longest example: once as they are, against padded rows of their own, and once with
    other tokens wherever the last completion must not look, which must not move that one. Three forwards, whatever they
    find, so that sharded ranks stay together.

    Raises:
        torch.OutOfMemoryError: it is about the device, not about the rows.
    """
    assert rows.segments is not None
    order = sorted(range(len(rows.segments)), key=lambda number: rows.segments[number].tokens)  # type: ignore[index]
    few = picked(rows, list(dict.fromkeys((order[0], order[-1]))))
    causal_lm = unwrap(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        expected, counts = completion_logps(model, separated(few, pad_token_id))
        found, wrong = _tried(model, few)
        other, also = _tried(model, altered(few))
        if found is None or other is None:
            return wrong or also
    finally:
        for module in training:
            module.training = True
    exact = causal_lm.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    allowed = _EXACT if exact else _ROUNDED
    off = ((found - expected).abs() / counts).max().item()
    if not off <= allowed:
        return f"log-probs are {off:.2g} nats a token off"
    leaked = abs((other[-1] - found[-1]).item()) / counts[-1].item()
    return None if leaked <= _LEAK * allowed else "completions see each other"
