"""Curves as inline SVG that takes its colours from the page, so that one picture fits light and dark."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Line = Sequence[Sequence[float | None]]
Curves = Mapping[str, Mapping[str, Line]]

# Colours that stand for the page's own; after drawing each becomes a CSS variable.
_INK, _GRID = "#010203", "#040506"
_SERIES = tuple(f"#0a0b{index:02x}" for index in range(6))
_VARIABLES = {_INK: "var(--muted)", _GRID: "var(--line)"} | {
    color: f"var(--series-{index + 1})" for index, color in enumerate(_SERIES)
}
SIZE = (4.7, 2.9)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawn panel: its title, what it shows, the SVG, and its runs with their colours (CSS variables)."""

    title: str
    note: str
    svg: str
    legend: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class _Panel:
    title: str
    note: str
    tags: tuple[str, ...]
    preference: bool
    level: float | None = None


_PANELS = (
    _Panel("SFT loss", "nats for each completion token; lower is better", ("loss",), False),
    _Panel("DPO loss", "dotted: ln 2, where a fresh policy starts", ("loss",), True, math.log(2)),
    _Panel(
        "Reward accuracy",
        "share of pairs whose chosen completion has the higher reward; dotted: chance",
        ("rewards/accuracies",),
        True,
        0.5,
    ),
    _Panel(
        "Reward margin", "reward of the chosen minus reward of the rejected", ("rewards/margins",), True, 0.0
    ),
    _Panel(
        "Log-probabilities",
        "sums over a completion, in nats: chosen solid, rejected dashed; the chosen should not fall",
        ("logps/chosen", "logps/rejected"),
        True,
    ),
)


def draw(curves: Curves, labels: Mapping[str, str] | None = None) -> list[Picture]:
    """The panels that the runs' curves have data for: loss, reward accuracy, margin and log-probs.

    `curves`: stage -> tag (`train/loss`, `val/loss`, ...) -> [[step, value], ...]. Runs of one kind share a
    panel. `labels`: what the legend calls a stage.
    """
    colors = {
        stage: index % len(_SERIES) for index, stage in enumerate(stage for stage in curves if curves[stage])
    }
    pictures = []
    for panel in _PANELS:
        stages = [stage for stage in colors if _is_preference(curves[stage]) == panel.preference]
        stages = [
            stage
            for stage in stages
            if any(_finite(curves[stage], f"{s}/{t}") for s in _SPLITS for t in panel.tags)
        ]
        if stages:
            legend = [
                ((labels or {}).get(stage, stage), f"var(--series-{colors[stage] + 1})") for stage in stages
            ]
            svg = _draw_panel(panel, {stage: (curves[stage], colors[stage]) for stage in stages})
            pictures.append(Picture(panel.title, panel.note, svg, legend))
    return pictures


_SPLITS = ("train", "val")


def _is_preference(tags: Mapping[str, Line]) -> bool:
    return any("rewards/" in tag for tag in tags)


def _finite(tags: Mapping[str, Line], tag: str) -> list[tuple[float, float]]:
    return [
        (float(step), float(value))
        for step, value in tags.get(tag, ())
        if step is not None and value is not None and math.isfinite(value)
    ]


def _draw_panel(panel: _Panel, stages: Mapping[str, tuple[Mapping[str, Line], int]]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": panel.title,
        "font.size": 9,
        "axes.linewidth": 0.8,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        _style(axes, panel)
        for tags, color in stages.values():
            for place, name in enumerate(panel.tags):
                dashes = "-" if place == 0 else (0, (4, 1.5))
                _draw_train(axes, _finite(tags, f"train/{name}"), _SERIES[color], dashes)
                _draw_validation(axes, _finite(tags, f"val/{name}"), _SERIES[color], dashes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_the_page(buffer.getvalue(), panel)


def _style(axes: Any, panel: _Panel) -> None:
    axes.set_xlabel("optimizer step", color=_INK)
    axes.tick_params(colors=_INK, length=0)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    if panel.level is not None:
        axes.axhline(panel.level, color=_INK, linewidth=1, linestyle=(0, (1, 2)))
    axes.margins(x=0.02)


def _draw_train(axes: Any, points: list[tuple[float, float]], color: str, dashes: Any) -> None:
    """Each step's value faintly, and their running mean."""
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3, linestyle=dashes)
    reach = len(values) // 40
    windows = [values[max(0, place - reach) : place + reach + 1] for place in range(len(values))]
    means = [sum(window) / len(window) for window in windows]
    axes.plot(steps, means, color=color, linewidth=1.8, linestyle=dashes)


def _draw_validation(axes: Any, points: list[tuple[float, float]], color: str, dashes: Any) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=color, linewidth=1, linestyle=dashes, marker="o", markersize=4)


def _for_the_page(svg: str, panel: _Panel) -> str:
    """Only the <svg> element: as wide as its place, named for screen readers, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{panel.title}: {panel.note}" ', 1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    # Ids are per picture; inline they share one page.
    prefix = re.sub(r"\W+", "-", panel.title.lower())
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg
