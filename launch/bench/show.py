"""The results as tables, for people: one for each workload and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

NAMES = {
    "tandem": "tandem",
    "tandem_concatenated": "tandem, two rows a pair",
    "trl_defaults": "TRL, defaults",
    "trl_fastest": "TRL, fastest",
    "trl_leanest": "TRL, leanest",
}
GIGA = 1e9
WIDTH = 124


def show(found: dict[str, Any]) -> None:
    """Print all tables, the fits, and what they were measured on."""
    console = Console(highlight=False, width=max(Console().width, WIDTH))
    for workload, dtype in groups(found["rows"]):
        console.print(_table(found, workload, dtype))
        console.print()
    for line in [*_fits(found), *_notes(found)]:
        console.print(escape(line), style="dim", soft_wrap=True)


def groups(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(workload, dtype) of the rows, each once."""
    return list(dict.fromkeys((row["workload"], row["dtype"]) for row in rows))


def rows_of(
    rows: Sequence[dict[str, Any]], workload: str, dtype: str
) -> dict[str, dict[int, dict[str, Any]]]:
    """arm -> epochs -> its row."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if (row["workload"], row["dtype"]) == (workload, dtype):
            found.setdefault(row["arm"], {})[row["epochs"]] = row
    return found


def _table(found: dict[str, Any], workload: str, dtype: str) -> Table:
    arms = rows_of(found["rows"], workload, dtype)
    epochs = sorted({each for rows in arms.values() for each in rows})
    about = found["workloads"][workload]
    title = (
        f"{workload}, {dtype}: {about['pairs']} pairs of {about['prompt_tokens']:.0f} +"
        f" {about['chosen_tokens']:.0f} / {about['rejected_tokens']:.0f} tokens on average"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for each in epochs:
        table.add_column(f"pairs/s\n{each} epoch{'s' * (each > 1)}", justify="right", no_wrap=True)
    for name in ("tandem's\nlead", "peak\nmemory", "share of\nmatmul", "FLOPs\nto ideal"):
        table.add_column(name, justify="right", no_wrap=True)
    lead = arms.get("tandem", {}).get(epochs[-1], {})
    for arm, rows in arms.items():
        table.add_row(*_cells(arm, rows, epochs, lead))
    return table


def _cells(
    arm: str, rows: dict[int, dict[str, Any]], epochs: Sequence[int], lead: dict[str, Any]
) -> list[str]:
    last = rows[epochs[-1]]
    name = f"{NAMES[arm]}\n  [dim]{told(last['settings'])}[/dim]" if last["settings"] else NAMES[arm]
    if "error" in last:
        return [f"{NAMES[arm]}\n  [red]failed: {escape(last['error'])}[/red]", *["-"] * (len(epochs) + 4)]
    speed = last["pairs_per_second"]["median"]
    ahead = f"{lead['pairs_per_second']['median'] / speed:.1f} x" if "pairs_per_second" in lead else "-"
    share, ratio, memory = last["model_flops_share"], last["flops_ratio"], last["peak_memory_bytes"]
    return [
        name,
        *(_speed(rows[each]) for each in epochs),
        "" if arm == "tandem" else ahead,
        f"{memory['median'] / GIGA:.2f} GB",
        "-" if share is None else f"{share['median']:.1%}",
        "-" if ratio is None else f"{ratio:.2f}",
    ]


def _speed(row: dict[str, Any]) -> str:
    speed = row["pairs_per_second"]
    words = f"{speed['median']:.2f} ({speed['min']:.2f}–{speed['max']:.2f})"
    return f"≈ {words}" if row["computed"] else words


def told(settings: dict[str, Any]) -> str:
    """An arm's settings in words."""
    words = []
    if "per_device_train_batch_size" in settings:
        words.append(f"{settings['per_device_train_batch_size']} at once")
        words.append("precomputed" if settings.get("precompute_ref_log_probs") else "live reference")
        words.append("checkpointing" if settings.get("gradient_checkpointing", True) else "")
    else:
        words = [f"{name} {value}" for name, value in settings.items()]
    return ", ".join(word for word in words if word)


def _fits(found: dict[str, Any]) -> list[str]:
    return [
        f"{each['workload']}, {each['dtype']}: a step of tandem takes {1e3 * each['intercept_seconds']:.0f} ms +"
        f" {1e6 * each['seconds_per_token']:.0f} µs a token (R² {each['r_squared']:.3f}, {len(each['points'])} steps)"
        for each in found["fits"]
        if each["seconds_per_token"] is not None
    ]


def _notes(found: dict[str, Any]) -> list[str]:
    machine, versions = found["machine"], found["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    with_ = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "trl") if name in versions
    )
    return [
        "median (least to most) of the repeats; building caches and preparing pairs counted, loading and imports not",
        *(
            ["≈: the last epoch's time taken again for those that were not run"]
            if any(row.get("computed") for row in found["rows"])
            else []
        ),
        f"{where}; {with_}; {found['date'][:10]}",
        found["command"],
    ]
