"""Intervals of figures over prompts or sentences, by resampling them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

_RESAMPLES = 2000


def ratio_interval(totals: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> list[float]:
    """95 % interval of sum(totals) / sum(counts): percentile bootstrap over prompts, the same at each call."""
    each = totals / counts
    if np.ptp(each) == 0:
        return [float(each[0]), float(each[0])]
    ratio: Callable[..., Any] = lambda total, count, axis: total.sum(axis) / count.sum(axis)  # noqa: E731
    spread = stats.bootstrap(
        (totals, counts),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=200,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return [float(spread.low), float(spread.high)]
