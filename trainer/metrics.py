"""Means over examples and tokens, right across micro-batches and ranks: sums over counts, never means of means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

PREFERENCE_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "nll",
)
SUPERVISED_METRICS = ("loss",)


class Means(Metric):
    """Several named means that share one state, so that reducing them over ranks is one small collective.

    `update({"loss": (sum, count), ...})` adds a micro-batch; `compute()` gives each mean, leaving out a name whose
    count is 0. The state `totals` is [sums, counts] by name, float64 where the device has it, so that long sums stay
    exact; it stays on its device, so that an update waits for nothing.
    """

    full_state_update = False
    totals: Float[Tensor, "2 names"]

    def __init__(self, names: Iterable[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.add_state("totals", torch.zeros(2, len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Mapping[str, tuple[Tensor | float | int, Tensor | float | int]]) -> None:
        for name, (total, count) in values.items():
            column = self.names.index(name)
            self.totals[0, column] += total
            self.totals[1, column] += count

    def compute(self) -> dict[str, float]:
        return self.means(self.totals)

    def means(self, totals: Float[Tensor, "2 names"]) -> dict[str, float]:
        """The means that `totals` (already reduced over ranks) stand for."""
        sums, counts = totals.tolist()
        return {name: s / c for name, s, c in zip(self.names, sums, counts, strict=True) if c}
