"""A matplotlib figure as inline SVG that takes its colours from the page, so that one picture fits light and dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

# Colours that stand for the page's own; after drawing each becomes a CSS variable.
INK, GRID = "#010203", "#040506"
SERIES = tuple(f"#0a0b{index:02x}" for index in range(6))
_VARIABLES = {INK: "var(--muted)", GRID: "var(--line)"} | {
    color: f"var(--series-{index + 1})" for index, color in enumerate(SERIES)
}
SIZE = (4.7, 2.9)


def variable(color: str) -> str:
    """The CSS variable that one of our colours becomes."""
    return _VARIABLES[color]


def drawn(plot: Callable[[Any], None], title: str, note: str, key: str | None = None) -> str:
    """The SVG of one panel, which `plot` draws into the axes it is given.

    Title and note are said to screen readers. `key`: what its ids begin with, other for each picture of a page
    (default: the title).
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "axes.linewidth": 0.8}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=SIZE, layout="constrained")
        plot(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_the_page(buffer.getvalue(), f"{title}: {note}", key or title)


def style(axes: Any, xlabel: str) -> None:
    """Grid and ticks only, in the page's colours."""
    axes.set_xlabel(xlabel, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _for_the_page(svg: str, label: str, key: str) -> str:
    """Only the <svg> element: as wide as its place, named for screen readers, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    # Ids are per picture; inline they share one page.
    prefix = re.sub(r"\W+", "-", key.lower())
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", svg)
    for color, name in _VARIABLES.items():
        svg = svg.replace(color, name)
    return svg
