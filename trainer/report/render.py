"""A report's JSON as Markdown, and as one HTML page that needs nothing beside it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from trainer.report.histograms import draw_pairs
from trainer.report.pairs_view import pairs_view
from trainer.report.pictures import Picture, draw
from trainer.report.prompts_view import draw_prompts, prompts_view
from trainer.report.view import label, percent, view

_HERE = Path(__file__).resolve().parent


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: the same parts as the HTML page, without the pictures."""
    found = view(report)
    pairs = [(each, ()) for each in found["pairs"]]
    return _markdown().get_template("report.md.j2").render(found | {"pairs": pairs})


def render_html(report: Mapping[str, Any]) -> str:
    """The report as one HTML page: no script, no outside file, for light and dark, wide and narrow."""
    curves, found = report.get("curves") or {}, view(report)
    pictures = draw(curves, {stage: label(report, stage) for stage in curves})
    summaries = (report.get("pairs") or {}).values()
    drawings = [_with_svg(draw_pairs(each, f"pairs-{place}")) for place, each in enumerate(summaries)]
    pairs = list(zip(found["pairs"], drawings, strict=True))
    page = _html().get_template("report.html.j2")
    return page.render(found | {"pairs": pairs}, style=_style(), pictures=_with_svg(pictures))


def render_pairs(summary: Mapping[str, Any]) -> str:
    """A summary of pairs (`trainer.report.pairs`) as one HTML page."""
    page = _html().get_template("pairs.html.j2")
    return page.render(found=pairs_view(summary), style=_style(), drawings=_with_svg(draw_pairs(summary)))


def render_prompts(summary: Mapping[str, Any]) -> str:
    """A summary of prompts (`trainer.pairs.prompts_told`) as one HTML page."""
    page = _html().get_template("prompts.html.j2")
    return page.render(found=prompts_view(summary), style=_style(), drawings=_with_svg(draw_prompts(summary)))


@functools.cache
def _markdown() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"marks": _markdown_marks, "cell": _cell, "percent": percent}
    return environment


@functools.cache
def _html() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), trim_blocks=True, lstrip_blocks=True, autoescape=True
    )
    environment.filters |= {"marks": _html_marks, "paths": _html_paths, "percent": percent}
    return environment


@functools.cache
def _style() -> Markup:
    return Markup((_HERE / "report.css").read_text(encoding="utf-8"))


def _with_svg(pictures: Sequence[Picture]) -> list[tuple[Picture, Markup]]:
    return [(picture, Markup(picture.svg)) for picture in pictures]


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
