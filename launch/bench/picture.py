"""The results as a picture: pairs a second and memory beside each other, a row for each workload and dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.bench.show import GIGA, NAMES, groups, rows_of, told

_OURS, _THEIRS, _INK, _FAINT = "#1f6feb", "#b6bfca", "#24292f", "#6e7781"


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the picture; its ending says which format (.png, .svg, .pdf)."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = groups(found["rows"])
    counts = [len(rows_of(found["rows"], *each)) for each in shown]
    with matplotlib.rc_context({"font.size": 10, "font.family": "sans-serif"}):
        figure = Figure(figsize=(10, 1.3 + sum(0.9 + 0.5 * count for count in counts)), layout="constrained")
        grid = figure.subplots(
            len(shown), 2, squeeze=False, gridspec_kw={"height_ratios": [0.9 + 0.5 * c for c in counts]}
        )
        for (speeds, memories), (workload, dtype) in zip(grid, shown, strict=True):
            arms = rows_of(found["rows"], workload, dtype)
            last = {arm: rows[max(rows)] for arm, rows in arms.items() if "error" not in rows[max(rows)]}
            epochs = max(max(rows) for rows in arms.values())
            title = f"{workload.replace('_', ' ')}, {dtype}"
            _bars(
                speeds, last, "pairs_per_second", 1.0, f"{title}: pairs per second, {epochs} epochs", "{:.2f}"
            )
            _bars(memories, last, "peak_memory_bytes", GIGA, "peak memory, GB", "{:.1f}")
            memories.set_yticklabels([])
        figure.suptitle(_title(found), fontsize=13, fontweight="bold", color=_INK, x=0.01, ha="left")
        figure.supxlabel(_foot(found), fontsize=8, color=_FAINT, x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _bars(axes: Any, rows: dict[str, Any], field: str, unit: float, title: str, form: str) -> None:
    names = [f"{NAMES[arm]}\n{told(row['settings'])}".strip() for arm, row in rows.items()]
    middle = [row[field]["median"] / unit for row in rows.values()]
    below = [m - row[field]["min"] / unit for m, row in zip(middle, rows.values(), strict=True)]
    above = [row[field]["max"] / unit - m for m, row in zip(middle, rows.values(), strict=True)]
    colors = [_OURS if arm.startswith("tandem") else _THEIRS for arm in rows]
    places = range(len(rows))
    axes.barh(
        places, middle, xerr=[below, above], color=colors, height=0.66, error_kw={"ecolor": _INK, "lw": 1}
    )
    most = max((m + a for m, a in zip(middle, above, strict=True)), default=1.0)
    for place, value, more in zip(places, middle, above, strict=True):
        axes.text(value + more + 0.015 * most, place, form.format(value), va="center", color=_INK)
    axes.set_yticks(list(places), names, color=_INK, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * most)
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.tick_params(length=0)
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def _title(found: dict[str, Any]) -> str:
    shape = found["settings"]["shape"]
    model = shape["shape"] or shape["folder"] or f"Llama {shape['layers']} x {shape['hidden']}"
    return f"DPO with IA³, {model}, {found['settings']['batch_size']} pairs a step"


def _foot(found: dict[str, Any]) -> str:
    machine, versions = found["machine"], found["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "trl") if name in versions
    )
    return f"{found['command']}\n{where}; {packages}; {found['date'][:10]}; building of caches counted"
