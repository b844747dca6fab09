"""From measurements to the rows that people and programs read."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from launch.bench.plan import Settings, Step, seconds, steps
from launch.bench.workloads import short

Known = list[tuple[Step, dict[str, Any]]]


def rows_and_fits(
    found: dict[str, Any], settings: Settings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each arm, workload, dtype and number of epochs that was measured; and the fits of step time."""
    rows: list[dict[str, Any]] = []
    fits: list[dict[str, Any]] = []
    for (workload, dtype), known in _known(found, settings).items():
        about = {"workload": short(workload), "dtype": dtype}
        for arm in settings.arms:
            runs = [m for s, m in known if s.arm == arm and s.purpose == "run"]
            for epochs in settings.epochs if runs else ():
                shared: dict[str, Any] = {
                    "rate": _rate(known),
                    "count": _count(known, arm),
                    "pairs": settings.pairs,
                }
                shared["useful"] = found["workloads"][short(workload)]["useful_flops_per_pair"]
                rows.append({"arm": arm, **about, "epochs": epochs, **_row(epochs, runs, **shared)})
        for step, measurement in known:
            if step.purpose == "scaling" and "result" in measurement:
                fits.append({**about, **fit(measurement["result"]["steps"])})
    return rows, fits


def _known(found: dict[str, Any], settings: Settings) -> dict[tuple[str, str], Known]:
    """(workload, dtype) -> the steps that were measured, with their measurements."""
    by_key = {each["key"]: each for each in found["measurements"]}
    known: dict[tuple[str, str], Known] = {}
    for step in steps(settings):
        chosen = found["chosen"].get(f"{step.workload}/{step.dtype}", {})
        if step.purpose == "sweep" or (step.after_sweep and not chosen):
            continue
        if (measurement := by_key.get(step.key(chosen))) is not None:
            known.setdefault((step.workload, step.dtype), []).append((step, measurement))
    return known


def _rate(known: Known) -> float | None:
    """The machine's best, over all its repeats."""
    rates = [m["result"]["flops_per_second"] for s, m in known if s.purpose == "rate" and "result" in m]
    return max(rates, default=None)


def _count(known: Known, arm: str) -> dict[str, Any] | None:
    counts = [m["result"] for s, m in known if (s.purpose, s.arm) == ("count", arm) and "result" in m]
    return counts[0] if counts else None


def _row(
    epochs: int,
    runs: Sequence[dict[str, Any]],
    *,
    rate: float | None,
    count: dict[str, Any] | None,
    pairs: int,
    useful: float,
) -> dict[str, Any]:
    results = [each["result"] for each in runs if "result" in each]
    row: dict[str, Any] = {"settings": runs[0]["job"]["settings"], "repeats": len(results)}
    if not results:
        return {**row, "error": runs[0]["error"]}
    speeds = [epochs * pairs / seconds(each, epochs) for each in results]
    ran = len(results[0]["epoch_seconds"])
    return {
        **row,
        "pairs_per_second": _spread(speeds),
        "peak_memory_bytes": _spread([each["peak_memory_bytes"] for each in results]),
        "model_flops_share": rate and _spread([speed * useful / rate for speed in speeds]),
        "flops_ratio": count and count["flops"] / count["useful_flops"],
        "flops_per_pair": count and count["flops"] / count["pairs"],
        "useful_flops_per_pair": useful,
        "matmul_flops_per_second": rate,
        "setup_seconds": _spread([each["setup_seconds"] for each in results]),
        "reference_seconds": _spread(
            [each["reference_seconds"] for each in results if each["reference_seconds"]]
        ),
        "loaded_memory_bytes": _spread([each["loaded_memory_bytes"] for each in results]),
        "threads": results[0]["threads"],
        "epochs_run": ran,
        # What a longer run takes is then the last epoch again, as often as it is missing.
        "computed": ran < epochs,
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def fit(points: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The straight line through (tokens, seconds) of optimizer steps: intercept, slope, R²."""
    from scipy.stats import linregress

    tokens, times = zip(*points, strict=True)
    if len(set(tokens)) < 2:
        return {
            "points": list(points),
            "intercept_seconds": None,
            "seconds_per_token": None,
            "r_squared": None,
        }
    line = linregress(tokens, times)
    return {
        "intercept_seconds": float(line.intercept),
        "seconds_per_token": float(line.slope),
        "r_squared": float(line.rvalue) ** 2,
        "points": [list(point) for point in points],
    }
