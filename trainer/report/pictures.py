"""A run's curves as pictures: what training lost, preferred and was rewarded with, step by step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.report.svg import INK, SERIES, drawn, style, variable
from trainer.report.texts import readable

Line = Sequence[Sequence[float | None]]
Curves = Mapping[str, Mapping[str, Line]]

_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)))


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawn panel: its title, what it shows, the SVG, and its runs with their colours (CSS variables)."""

    title: str
    note: str
    svg: str
    legend: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class _Panel:
    """`preference`: of runs that train on pairs, or of those that do not; None: whatever the run trains on.

    `splits`: what stands before a tag. `band`: tags of the low and the high end of an interval.
    """

    title: str
    note: str
    tags: tuple[str, ...]
    preference: bool | None
    level: float | None = None
    splits: tuple[str, ...] = ("train/", "val/")
    band: tuple[str, str] | None = None


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


def _sampled(title: str, note: str, *tags: str, band: tuple[str, str] | None = None) -> _Panel:
    return _Panel(title, note, tags, None, splits=("reward/",), band=band)


_REWARD_PANELS = (
    _sampled(
        "Mean reward",
        "of sampled continuations of held-out prompts; the band is the 95 % interval",
        "mean",
        band=("low", "high"),
    ),
    _sampled("Token entropy", "nats for each sampled token; texts grow alike where it falls", "entropy"),
    _sampled(
        "KL to the reference", "nats for each text; how far the policy has gone from where it began", "kl"
    ),
    _sampled(
        "Distinct n-grams",
        "share of n-grams that are different ones: solid single tokens, dashed pairs, dotted triples",
        "distinct_1",
        "distinct_2",
        "distinct_3",
    ),
    _sampled(
        "Self-similarity",
        "how much of a text stands in the others too; lower is more diverse",
        "self_similarity",
    ),
    _sampled("Length", "tokens of a continuation", "length"),
)


def draw(curves: Curves, labels: Mapping[str, str] | None = None) -> list[Picture]:
    """The panels that the runs' curves have data for: loss, reward accuracy, margin, log-probs, sampled rewards.

    `curves`: stage -> tag (`train/loss`, `val/loss`, `reward/mean`, ...) -> [[step, value], ...]. Runs of one kind
    share a panel. `labels`: what the legend calls a stage.
    """
    colors = {
        stage: SERIES[index % len(SERIES)]
        for index, stage in enumerate(stage for stage in curves if curves[stage])
    }
    pictures = []
    for place, panel in enumerate((*_PANELS, *_REWARD_PANELS, *_further_rewards(curves))):
        stages = [stage for stage in colors if _shows(panel, curves[stage])]
        if stages:
            legend = [((labels or {}).get(stage, stage), variable(colors[stage])) for stage in stages]
            key = panel.title if panel in _PANELS else f"panel-{place}"
            svg = _draw_panel(panel, {stage: (curves[stage], colors[stage]) for stage in stages}, key)
            pictures.append(Picture(panel.title, panel.note, svg, legend))
    return pictures


def _further_rewards(curves: Curves) -> list[_Panel]:
    """Panels of the rewards beside the first: `reward/NAME`, a mean of the same continuations."""
    known = {tag for panel in _REWARD_PANELS for tag in (*panel.tags, *(panel.band or ()))}
    tags = dict.fromkeys(tag for line in curves.values() for tag in line if tag.startswith("reward/"))
    names = [name for tag in tags if (name := tag.removeprefix("reward/")) not in known]
    return [_sampled(f"Reward: {readable(name)}", "mean of the same continuations", name) for name in names]


def _shows(panel: _Panel, tags: Mapping[str, Line]) -> bool:
    if panel.preference not in (None, _is_preference(tags)):
        return False
    return any(_finite(tags, split + tag) for split in panel.splits for tag in panel.tags)


def _is_preference(tags: Mapping[str, Line]) -> bool:
    return any("rewards/" in tag for tag in tags)


def _finite(tags: Mapping[str, Line], tag: str) -> list[tuple[float, float]]:
    return [
        (float(step), float(value))
        for step, value in tags.get(tag, ())
        if step is not None and value is not None and math.isfinite(value)
    ]


def _draw_panel(panel: _Panel, stages: Mapping[str, tuple[Mapping[str, Line], str]], key: str) -> str:
    def plot(axes: Any) -> None:
        style(axes, "optimizer step")
        if panel.level is not None:
            axes.axhline(panel.level, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        axes.margins(x=0.02)
        for tags, color in stages.values():
            _draw_band(axes, panel, tags, color)
            for name, dashes in zip(panel.tags, _DASHES, strict=False):
                for split in panel.splits:
                    draw_line = _draw_train if split == "train/" else _draw_dots
                    draw_line(axes, _finite(tags, split + name), color, dashes)

    return drawn(plot, panel.title, panel.note, key)


def _draw_band(axes: Any, panel: _Panel, tags: Mapping[str, Line], color: str) -> None:
    if panel.band is None:
        return
    low, high = (dict(_finite(tags, panel.splits[0] + name)) for name in panel.band)
    steps = sorted(low.keys() & high.keys())
    if steps:
        ends = [low[step] for step in steps], [high[step] for step in steps]
        axes.fill_between(steps, *ends, color=color, alpha=0.15, linewidth=0)


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


def _draw_dots(axes: Any, points: list[tuple[float, float]], color: str, dashes: Any) -> None:
    """What is measured now and then: validation, sampled rewards."""
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=color, linewidth=1, linestyle=dashes, marker="o", markersize=4)
