"""A report's JSON as Markdown, and as one HTML page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from trainer.report.pictures import draw
from trainer.report.view import label, view

_HERE = Path(__file__).resolve().parent


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: the same parts as the HTML page, without the curves."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["marks"] = _markdown_marks
    environment.filters["cell"] = _cell
    return environment.get_template("report.md.j2").render(view(report))


def render_html(report: Mapping[str, Any]) -> str:
    """The report as one HTML page: no script, no outside file, for light and dark, wide and narrow."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    environment.filters["marks"] = _html_marks
    environment.filters["paths"] = _html_paths
    curves = report.get("curves") or {}
    pictures = draw(curves, {stage: label(report, stage) for stage in curves})
    style = Markup((_HERE / "report.css").read_text(encoding="utf-8"))
    svgs = [Markup(picture.svg) for picture in pictures]
    return environment.get_template("report.html.j2").render(
        view(report), style=style, pictures=list(zip(pictures, svgs, strict=True))
    )


def _html_paths(text: str) -> Markup:
    """Long paths break at their slashes rather than in a word."""
    return Markup("/<wbr>").join(escape(part) for part in text.split("/"))


def _html_marks(runs: Sequence[tuple[str, str]]) -> Markup:
    tags = {"swapped": "<b>{}</b>", "changed": "<i>{}</i>", "": "{}"}
    return Markup("").join(Markup(tags[kind]).format(text) for text, kind in runs)


def _markdown_marks(runs: Sequence[tuple[str, str]]) -> str:
    return "".join(f"**{_cell(text)}**" if kind == "swapped" else _cell(text) for text, kind in runs)


def _cell(text: str) -> str:
    """Text that stays in its table cell and means only itself."""
    for char in "\\`*_[]<>|":
        text = text.replace(char, "\\" + char)
    return " ".join(text.split("\n"))
