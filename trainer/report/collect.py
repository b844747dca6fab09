"""Gathers what a run (or a recipe's folder of runs) left on disk into one JSON-able report.

A run's folder holds any of manifest.json, evaluation.json (letters), reward.json, win_rate.json, samples.jsonl,
TensorBoard events and metrics.csv; a folder of pairs holds pairs.jsonl and a manifest of kind `pairs`, a model from
scratch its scratch.json. A recipe's folder holds one such folder for each stage. Whatever is missing is left out of
the report.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.provenance import code_version, git_revision, read_json, versions, write_json, write_text
from trainer.report.pairs import pairs_of_folder
from trainer.report.render import render_html, render_markdown
from trainer.schema import UserError

Report = dict[str, Any]
Curves = dict[str, list[list[float]]]

STAGE_ORDER = ("base", "sft", "sft_long", "dpo")
MAX_POINTS = 1000
_HALVES = re.compile("[\ud800-\udfff]")
_EVALUATIONS = {"rewards": "reward.json", "win_rates": "win_rate.json"}
_SCRATCH = "scratch.json"
_LINEAGE = "lineage.json"
_SIGNS = (
    "manifest.json",
    "evaluation.json",
    *_EVALUATIONS.values(),
    _SCRATCH,
    "samples.jsonl",
    "metrics.csv",
    "events.out.tfevents*",
)
_PARTS = ("stages", *_EVALUATIONS, "pairs", "self_play", "curves", "runs", "made", "samples")


def collect(
    folder: str | Path,
    title: str | None = None,
    published: dict[str, Any] | None = None,
    commands: Sequence[str] = (),
) -> Report:
    """The report of a run's or a recipe's folder.

    `published`: scores of the published answers (`trainer.evaluation.letters.published_scores`). `commands`:
    how to repeat it all. Keys: title, recipe, created, report (the code that made this report), commands,
    published; and by stage's name stages (evaluations of letters), curves, runs (manifests: what trained it),
    samples. Where there are any, also rewards and win_rates (evaluations), pairs (what lies in them) and made
    (manifests of what is neither a run nor pairs, such as models from scratch), and self_play (its lineages).
    Raises `UserError` if the folder is missing or holds no run, or a file in it is not valid JSON.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder; give a run's folder, or the folder that holds a recipe's runs"
        )
    stages = _stage_folders(root)
    if not stages:
        if (root / "report.json").is_file():
            return read_json(root / "report.json")
        raise UserError(
            f"{root}: holds no run ({', '.join(_SIGNS)}); give a folder that `tandem fit` or `run` wrote"
        )
    name = root.resolve().name
    manifests = _read_each(stages, "manifest.json")
    return _writable(
        {
            "title": title or name,
            "recipe": name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "report": _of_this_report(),
            "commands": list(commands) or [f"tandem report {folder}"],
            "stages": _read_each(stages, "evaluation.json"),
            "published": published or {},
            "curves": {stage: curves for stage, path in stages.items() if (curves := read_curves(path))},
            "runs": {stage: made for stage, made in manifests.items() if _kind(made) == "run"},
            "samples": {stage: samples for stage, path in stages.items() if (samples := _samples(path))},
        }
        | _beyond_letters(stages, manifests)
        | _lineages(root)
    )


def _beyond_letters(stages: dict[str, Path], manifests: dict[str, Any]) -> Report:
    """Rewards, win rates, pairs and what else was made: the parts that there are."""
    found = {part: _read_each(stages, name) for part, name in _EVALUATIONS.items()}
    pairs = [stage for stage, made in manifests.items() if _kind(made) == "pairs"]
    found["pairs"] = {stage: pairs_of_folder(stages[stage]) for stage in pairs}
    known = ("run", "pairs", "spin_pairs")  # a lineage tells of the last
    others = {stage: made for stage, made in manifests.items() if _kind(made) not in known}
    found["made"] = others | _read_each(stages, _SCRATCH)
    return {part: each for part, each in found.items() if each}


def _lineages(root: Path) -> Report:
    """Self-play's iterations (`lineage.json`), of this folder or of those in it."""
    found = {path.resolve().parent.name: read_json(path) for path in sorted(root.glob(f"*/{_LINEAGE}"))}
    if (root / _LINEAGE).is_file():
        found[root.resolve().name] = read_json(root / _LINEAGE)
    return {"self_play": found} if found else {}


def _kind(manifest: Any) -> str:
    """What a manifest is of: a run's does not say, since it was there before the others."""
    return str((manifest or {}).get("kind") or "run")


def overlay(reports: Sequence[Report], names: Sequence[str] = ()) -> Report:
    """Several reports as one, stages called `name/stage`: curves and rates lie over each other.

    `names`: what the reports are called, in their order; by default as their recipes are.
    """
    if len(reports) == 1:
        return reports[0]
    names = _distinct(
        list(names) or [str(report.get("recipe") or report.get("title") or "run") for report in reports]
    )
    merged: Report = {"title": " and ".join(names), "recipe": None, "report": _of_this_report()}
    merged["created"] = max(str(report.get("created") or "") for report in reports)
    merged["commands"] = [command for report in reports for command in report.get("commands") or []]
    merged["published"] = next((report["published"] for report in reports if report.get("published")), {})
    for part in _PARTS:
        merged[part] = {
            name if stage == report.get("recipe") else f"{name}/{stage}": content
            for name, report in zip(names, reports, strict=True)
            for stage, content in (report.get(part) or {}).items()
        }
    return merged


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """Write report.json, report.md and report.html, each whole or not at all; returns their paths."""
    folder = Path(folder)
    paths = [folder / f"report.{kind}" for kind in ("json", "md", "html")]
    write_json(paths[0], report)
    write_text(paths[1], render_markdown(report))
    write_text(paths[2], render_html(report))
    return paths


def read_curves(folder: Path) -> Curves:
    """Tag -> [[step, value], ...] of a run's TensorBoard events and metrics.csv; about 1,000 points at most.

    Where a resumed run wrote a step again the later value holds. Values that are not finite become gaps
    (None).
    """
    points: dict[str, dict[int, float | None]] = {}
    for tag, step, value in [*_from_csv(folder), *_from_events(folder)]:
        points.setdefault(tag, {})[step] = value if math.isfinite(value) else None
    return {tag: _thin(sorted(line.items())) for tag, line in sorted(points.items())}  # type: ignore[misc]


def _stage_folders(root: Path) -> dict[str, Path]:
    if _is_run(root):
        return {root.resolve().name: root}
    found = {path.name: path for path in root.iterdir() if path.is_dir() and _is_run(path)}
    started = {name: _started(path) for name, path in found.items()}

    def place(name: str) -> tuple[int, str, str]:
        known = STAGE_ORDER.index(name) if name in STAGE_ORDER else len(STAGE_ORDER)
        return known, started[name], name

    return {name: found[name] for name in sorted(found, key=place)}


def _is_run(folder: Path) -> bool:
    return any(next(folder.glob(sign), None) is not None for sign in _SIGNS)


def _started(folder: Path) -> str:
    path = folder / "manifest.json"
    return str(read_json(path).get("started") or "") if path.is_file() else ""


def _read_each(stages: dict[str, Path], name: str) -> dict[str, Any]:
    """The file of this name of each stage that has one."""
    return {stage: read_json(path / name) for stage, path in stages.items() if (path / name).is_file()}


def _of_this_report() -> dict[str, Any]:
    """The code that makes the report; what made the results is in the runs' manifests and evaluations."""
    return {"git": git_revision(), "code": code_version(), "versions": versions()}


def _samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl; without it, what reward evaluations sampled while training."""
    if (folder / "samples.jsonl").is_file():
        return _json_lines(folder / "samples.jsonl")
    path = folder / "reward_evaluations.jsonl"
    return [
        {"step": row.get("step"), "prompt": example.get("prompt"), "policy": example.get("completion")}
        for row in (_json_lines(path) if path.is_file() else [])
        for example in row.get("examples") or []
    ]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    # A line is whole once its line end is written: what follows the last one is of a run that is writing, or
    # was killed.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}); remove the line") from error
    return rows


def _from_events(folder: Path) -> list[tuple[str, int, float]]:
    paths = sorted(folder.rglob("events.out.tfevents*"))
    if not paths:
        return []
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    rows = []
    for path in paths:
        events = EventAccumulator(str(path), size_guidance={SCALARS: 0})
        events.Reload()
        for tag in events.Tags()[SCALARS]:
            rows += [(event.wall_time, tag, event.step, event.value) for event in events.Scalars(tag)]
    return [row[1:] for row in sorted(rows)]


def _from_csv(folder: Path) -> list[tuple[str, int, float]]:
    rows = []
    for path in sorted(folder.rglob("metrics.csv")):
        with open(path, encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                step = row.get("step")
                if not step:
                    continue
                rows += [
                    (tag, int(float(step)), float(value))
                    for tag, value in row.items()
                    if tag not in ("step", "epoch") and isinstance(value, str) and value
                ]
    return rows


def _thin(line: list[Any]) -> list[list[Any]]:
    every = max(1, math.ceil(len(line) / MAX_POINTS))
    kept = line[::every]
    return [list(point) for point in (kept if kept[-1] == line[-1] else [*kept, line[-1]])]


def _writable(value: Any) -> Any:
    """JSON has no NaN, and UTF-8 no halves of characters: the former become None, the latter replacement marks."""
    if isinstance(value, dict):
        return {_writable(key): _writable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_writable(item) for item in value]
    if isinstance(value, str):
        return _HALVES.sub("\ufffd", value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _distinct(names: list[str]) -> list[str]:
    return [
        f"{name} ({names[: place + 1].count(name)})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]
