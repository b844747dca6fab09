"""Distributions of scores, margins and lengths as pictures, from the histograms of a summary of pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.report.pictures import Picture
from trainer.report.svg import INK, SERIES, drawn, style, variable

_PANELS = (
    ("scores", "Scores", "share of the texts of each kind, in percent", "score"),
    (
        "margins",
        "Margins",
        "score of the chosen minus score of the rejected, in percent of the pairs",
        "margin",
    ),
    ("lengths", "Lengths", "characters of the chosen and of the rejected, in percent of each", "characters"),
)
# All candidates lie behind, in the ink of the axes.
_COLORS = {"chosen": SERIES[0], "rejected": SERIES[1], "margin": SERIES[0], "candidates": INK}


def draw_pairs(summary: Mapping[str, Any], key: str = "pairs") -> list[Picture]:
    """The histograms that the summary has. `key`: other for each summary on a page."""
    found = summary.get("histograms") or {}
    return [
        _draw(found[name], title, note + _outside(found[name]), xlabel, f"{key}-{title}")
        for name, title, note, xlabel in _PANELS
        if found.get(name)
    ]


def _outside(histogram: Mapping[str, Any]) -> str:
    return f"; {histogram['outside']:,} lie outside the picture" if histogram.get("outside") else ""


def _draw(histogram: Mapping[str, Any], title: str, note: str, xlabel: str, key: str) -> Picture:
    counts = {name: each for name, each in histogram["counts"].items() if name in _COLORS}

    def plot(axes: Any) -> None:
        style(axes, xlabel)
        for name in sorted(counts, key=lambda name: name != "candidates"):
            shares = 100 * np.array(counts[name]) / max(1, histogram["total"][name])
            behind = name == "candidates"
            axes.stairs(
                shares, histogram["edges"], fill=True, color=_COLORS[name], alpha=0.12 if behind else 0.22
            )
            axes.stairs(shares, histogram["edges"], color=_COLORS[name], linewidth=1 if behind else 1.6)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.02)

    legend = [(name, variable(_COLORS[name])) for name in counts] if len(counts) > 1 else []
    return Picture(title, note, drawn(plot, title, note, key), legend)
