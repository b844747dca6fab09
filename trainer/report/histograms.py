"""Distributions of scores, margins and lengths as pictures, from the histograms of a summary of pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.report.pictures import Picture
from trainer.report.svg import INK, SERIES, drawn, style, variable
from trainer.report.texts import readable

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
_LONGEST = 24
"""Characters of a criterion's name beside its line."""


def draw_pairs(summary: Mapping[str, Any], key: str = "pairs") -> list[Picture]:
    """The histograms that the summary has. `key`: other for each summary on a page."""
    found = summary.get("histograms") or {}
    drawings = [
        _draw(found[name], title, note + _outside(found[name]), xlabel, f"{key}-{title}")
        for name, title, note, xlabel in _PANELS
        if found.get(name)
    ]
    judging = summary.get("judging") or {}
    criteria = judging.get("criteria") or {}
    return drawings + ([_by_criterion(judging, f"{key}-criteria")] if len(criteria) > 1 else [])


def _by_criterion(judging: Mapping[str, Any], key: str) -> Picture:
    """The mean scores of chosen and rejected by each criterion, on one line each."""
    title, note = "Criteria", "mean score of the chosen and of the rejected by each criterion"
    criteria, names = judging["criteria"], judging.get("names") or {}
    rows = [(_tick(names.get(name, name)), each) for name, each in criteria.items() if _both(each)]

    def plot(axes: Any) -> None:
        style(axes, "score")
        for place, (_, each) in enumerate(rows):
            ends = [each[f"{side}_mean"] for side in ("chosen", "rejected")]
            axes.plot(ends, [place, place], color=INK, linewidth=1)
            for side, end in zip(("chosen", "rejected"), ends, strict=True):
                axes.plot([end], [place], marker="o", markersize=7, color=_COLORS[side])
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0.9, 5.1)  # the whole scale: how little scores differ is to be seen

    legend = [(side, variable(_COLORS[side])) for side in ("chosen", "rejected")]
    return Picture(title, note, drawn(plot, title, note, key), legend)


def _tick(name: str) -> str:
    """A name that leaves room for the picture; a dollar would begin a formula."""
    told = " ".join(readable(name).split())
    return (told if len(told) <= _LONGEST else told[: _LONGEST - 1] + "…").replace("$", r"\$")


def _both(each: Mapping[str, Any]) -> bool:
    return each.get("chosen_mean") is not None and each.get("rejected_mean") is not None


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
