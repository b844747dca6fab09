"""A summary of prompts turned into what its page places: lengths, scripts, openings, examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.report.pictures import Picture
from trainer.report.svg import INK, SERIES, drawn, style
from trainer.report.texts import facts, number, readable, shown

_GROUPS = {
    "some": (
        "Some of them",
        "The first in an order that follows from their content alone, which is a random one.",
    ),
    "shortest": ("The shortest", "Is there something to answer?"),
    "longest": ("The longest", "Do they leave room for an answer?"),
}
_LONGEST = 18


def prompts_view(summary: Mapping[str, Any]) -> dict[str, Any]:
    """`title`, `headline`, `flow`, `table`, `notes`, `groups` of examples, `facts`."""
    source = summary.get("source") or {}
    title = str(source.get("path") or source.get("class") or "prompts").rstrip("/").rpartition("/")[2]
    return {
        "title": readable(title),
        "headline": _headline(summary),
        "flow": _flow(summary["counts"]),
        "table": _table(summary),
        "notes": _notes(summary),
        "groups": [
            {"title": told, "note": note, "texts": [shown(text) for text in summary["examples"][name]]}
            for name, (told, note) in _GROUPS.items()
            if summary["examples"].get(name)
        ],
        "facts": facts(source) + facts(summary.get("hashes") or {}),
        "versions": ", ".join(f"{name} {value}" for name, value in (summary.get("versions") or {}).items()),
        "code": f"git {summary['git']}" if summary.get("git") else "",
    }


def draw_prompts(summary: Mapping[str, Any]) -> list[Picture]:
    """Histograms of lengths, and the most frequent first words."""
    drawings = [
        _histogram(summary[name], title, unit)
        for name, title, unit in (("characters", "Length", "characters"), ("words", "Words", "words"))
    ]
    bars = []
    if len(summary["scripts"]) > 1:
        bars.append(
            ("Scripts", "prompts by the script of most of their letters", list(summary["scripts"].items()))
        )
    if summary["openings"]:
        bars.append(("Openings", "how many prompts begin with the word", summary["openings"]))
    return drawings + [_bars(*each) for each in bars]


def _headline(summary: Mapping[str, Any]) -> str:
    count, words = summary["prompts"], summary["words"]
    told = f"{count:,} prompt{'s' * (count != 1)}, {words['median']:,} words in the median"
    scripts = list(summary["scripts"].items())
    if scripts:
        name, most = scripts[0]
        told += f", {_percent(most / count)} of them in {name} letters" if name != "no letters" else ""
    return told + "."


def _flow(counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Kept, of other parts, and why the rest was left out: name, count, share of all rows."""
    rows = [("Kept", counts.get("kept", 0), "kept"), ("In other parts", counts.get("other_parts", 0), "left")]
    rows += [
        (f"Left out: {readable(name.removeprefix('dropped_').replace('_', ' '))}", count, "left")
        for name, count in counts.items()
        if name.startswith("dropped_")
    ]
    whole = max(1, counts.get("rows") or sum(count for _, count, _ in rows))
    return [
        {"name": name, "count": f"{count:,}", "kind": kind, "share": min(100.0, 100 * count / whole)}
        for name, count, kind in rows
        if count or kind == "kept"
    ]


def _table(summary: Mapping[str, Any]) -> dict[str, Any]:
    columns = ["median", "p90", "p99", "max"]
    rows = [
        (name.capitalize(), [number(summary[name][column], 0) for column in columns])
        for name in ("characters", "words")
    ]
    return {"columns": ["Median", "9 of 10", "99 of 100", "Longest"], "rows": rows}


def _notes(summary: Mapping[str, Any]) -> list[str]:
    notes = [
        f"{_percent(summary['questions'])} end with a question mark; {_percent(summary['several_lines'])} have several"
        " lines."
    ]
    if alike := summary["alike"]:
        notes.append(f"{alike:,} are like another one but for case, punctuation and blanks.")
    return notes


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def _histogram(found: Mapping[str, Any], title: str, unit: str) -> Picture:
    outside = f"; {found['outside']:,} longer ones lie outside" if found["outside"] else ""
    note = f"how many prompts have so many {unit}{outside}"

    def plot(axes: Any) -> None:
        style(axes, unit)
        axes.stairs(found["counts"], found["edges"], fill=True, color=SERIES[0], alpha=0.22)
        axes.stairs(found["counts"], found["edges"], color=SERIES[0], linewidth=1.6)
        axes.set_ylim(bottom=0)

    return Picture(title, note, drawn(plot, title, note, f"prompts-{title}"), [])


def _bars(title: str, note: str, found: list[Any]) -> Picture:
    def plot(axes: Any) -> None:
        style(axes, "prompts")
        places = range(len(found))
        axes.barh(places, [count for _, count in found], color=SERIES[0], alpha=0.55, height=0.7)
        for place, (_, count) in enumerate(found):
            axes.annotate(
                f" {count:,}", (count, place), va="center", color=INK, fontsize=8, annotation_clip=False
            )
        axes.set_yticks(places, [_tick(name) for name, _ in found])
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.grid(False, axis="y")

    return Picture(title, note, drawn(plot, title, note, f"prompts-{title}"), [])


def _tick(name: str) -> str:
    """A word that leaves room for the picture; a dollar would begin a formula."""
    told = " ".join(readable(name).split())
    return (told if len(told) <= _LONGEST else told[: _LONGEST - 1] + "…").replace("$", r"\$")
