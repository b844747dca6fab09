"""Reward evaluations of a report turned into what the templates place: before and after, and what the rise cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.report.texts import Shown, between, facts, number, readable, shown

Evaluations = Mapping[str, Mapping[str, Any]]
Label = Callable[[str], str]

EXAMPLES, MORE_EXAMPLES = 4, 12
FALL = 0.15
"""A loss of diversity beyond this share of the base's is marked."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """A mean on its reward's scale: `left`, `width` of the interval and `place` of the mean, in percent."""

    label: str
    text: str
    between: str
    place: float | None
    left: float | None
    width: float | None
    change: str
    before: bool


@dataclasses.dataclass(frozen=True)
class Scale:
    """One reward: its stages on one scale; `zero` is where 0 lies, if it does; `parts`: what it is the mean of."""

    name: str
    low: str
    high: str
    zero: float | None
    rows: list[Mark]
    columns: list[str]
    parts: list[dict[str, Any]]
    unscored: str


@dataclasses.dataclass(frozen=True)
class Cell:
    text: str
    between: str = ""
    change: str = ""
    worse: bool = False


@dataclasses.dataclass(frozen=True)
class _Measure:
    """One line of the table: `better` is +1 where more means more diverse, -1 where less does, 0 for neither."""

    key: str
    name: str
    told: str
    digits: int = 2
    better: int = 0


_MEASURES = (
    _Measure("entropy", "Token entropy", "nats a token", 2, 1),
    _Measure("distinct_1", "Distinct-1", "share of tokens that are different ones", 3, 1),
    _Measure("distinct_2", "Distinct-2", "the same of pairs", 3, 1),
    _Measure("distinct_3", "Distinct-3", "the same of triples", 3, 1),
    _Measure("self_similarity", "Self-similarity", "how alike the texts are; lower is more diverse", 3, -1),
    _Measure("length", "Length", "tokens", 1),
    _Measure("finished", "Finished", "share of texts that came to an end", 3),
    _Measure("kl", "KL to the reference", "nats a text", 2),
)


def reward_view(found: Evaluations, label: Label) -> dict[str, Any]:
    """`setting`, `scales`, `models`, `columns` and `measures` of the table of diversity, `prompts` with their texts."""
    found = {name: each for name, each in found.items() if each}
    if not found:
        return {}
    prompts = _prompts(found, label)
    return {
        "setting": _setting(found, label),
        "scales": [_scale(name, found, label) for name in reward_names(found)],
        "columns": [label(stage) for stage in found],
        "measures": _measures(found),
        "models": _models(found),
        "fall": f"{FALL:.0%}".replace("%", "\u00a0%"),
        "prompts": prompts[:EXAMPLES],
        "more_prompts": prompts[EXAMPLES:],
    }


def _models(found: Evaluations) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the rewards are: each one's name and its settings, as the first evaluation that tells them has them."""
    told: dict[str, Any] = {}
    for each in found.values():
        told = (each.get("reward_models") or {}) | told
    return [(readable(name), facts(settings)) for name, settings in told.items()]


def reward_names(found: Evaluations) -> list[str]:
    """The rewards' names, in the order of the evaluations that have them: the first is the one trained for."""
    return list(dict.fromkeys(name for each in found.values() for name in each.get("rewards") or {}))


def is_before(stage: str, evaluation: Mapping[str, Any]) -> bool:
    """Whether an evaluation is of the model before training: its stage says so, or it has no adapter."""
    model = evaluation.get("model") or {}
    named = "base" in stage.rpartition("/")[2].split("_")
    return named or ("adapter" in model and model["adapter"] is None and not model.get("start"))


def before(stage: str, found: Evaluations) -> Mapping[str, Any] | None:
    """What a stage is compared with: the base of its own run, or the only base there is; None for a base."""
    bases = {name: each for name, each in found.items() if is_before(name, each)}
    if stage in bases:
        return None
    own = [each for name, each in bases.items() if name.rpartition("/")[0] == stage.rpartition("/")[0]]
    return own[0] if own else next(iter(bases.values())) if len(bases) == 1 else None


def headline(found: Evaluations, label: Label) -> str:
    """The last stages' first reward beside the base's, in its standard deviations, and what became of diversity."""
    found = {name: each for name, each in found.items() if each}
    names = reward_names(found)
    if not names:
        return ""
    after = [name for name in found if not is_before(name, found[name])] or [list(found)[-1]]
    told = [_one_headline(stage, names[0], found, label) for stage in after]
    return "\n".join(text for text in told if text)


def _one_headline(stage: str, reward: str, found: Evaluations, label: Label) -> str:
    now, base = found[stage], before(stage, found)
    mean = _mean(now, reward)
    if mean is None:
        return f"{label(stage)}: no reward was measured."
    spread = between(_interval(now, reward))
    text = f"{label(stage)}: mean reward {number(mean)}" + (
        f" (95\u00a0% interval {spread})" if spread else ""
    )
    was = _mean(base, reward) if base else None
    if base is None or was is None:
        return text + "."
    text += f", {number(was)} before training: {_in_sds(mean - was, base, reward)}"
    kept = [
        f"{name} {change}"
        for name, key in (("entropy", "entropy"), ("distinct\u20112", "distinct_2"))
        if (change := _relative(_value(now, key), _value(base, key)))
    ]
    return text + (f"; {' and '.join(kept)}" if kept else "") + "."


def _scale(reward: str, found: Evaluations, label: Label) -> Scale:
    stages = {name: each for name, each in found.items() if _mean(each, reward) is not None}
    ends = [
        value
        for each in stages.values()
        for value in (_mean(each, reward), *(_interval(each, reward) or ()))
        if value is not None and math.isfinite(value)
    ]
    low, high = min(ends), max(ends)
    span = (high - low) or abs(high) or 1.0
    low, high = low - 0.06 * span, high + 0.06 * span
    zero = _place(0.0, low, high) if low < 0 < high else None
    rows = [_mark(stage, reward, found, (low, high), label) for stage in stages]
    return Scale(
        readable(reward),
        number(low),
        number(high),
        zero,
        rows,
        [label(stage) for stage in stages],
        _parts(reward, stages),
        _unscored(reward, stages, label),
    )


def _parts(reward: str, stages: Evaluations) -> list[dict[str, Any]]:
    """A line for each part of a reward, with its mean at each stage and what it gained since before training."""
    names = dict.fromkeys(
        part for each in stages.values() for part in each["rewards"][reward].get("parts") or {}
    )
    return [
        {"name": readable(part), "cells": [_part(part, reward, stage, stages) for stage in stages]}
        for part in names
    ]


def _part(part: str, reward: str, stage: str, stages: Evaluations) -> Cell:
    def entry(evaluation: Mapping[str, Any] | None) -> Mapping[str, Any]:
        return (((evaluation or {}).get("rewards", {}).get(reward) or {}).get("parts") or {}).get(part) or {}

    now, was = entry(stages[stage]), entry(before(stage, stages))
    if not isinstance(now.get("mean"), int | float):
        return Cell("–")
    change = number(now["mean"] - was["mean"], sign=True) if isinstance(was.get("mean"), int | float) else ""
    return Cell(number(now["mean"]), between(now.get("interval")), change)


def _unscored(reward: str, stages: Evaluations, label: Label) -> str:
    """`3 texts of DPO got no score (cut JSON)`: they are in no mean."""
    told = [
        f"{label(stage)}: {sum(found.values()):,} texts got no score ({', '.join(found)})"
        for stage, each in stages.items()
        if (found := each["rewards"][reward].get("unscored"))
    ]
    return "; ".join(told)


def _place(value: float, low: float, high: float) -> float:
    return 100 * (value - low) / (high - low)


def _mark(stage: str, reward: str, found: Evaluations, ends: tuple[float, float], label: Label) -> Mark:
    each, base = found[stage], before(stage, found)
    mean, interval = _mean(each, reward), _interval(each, reward)
    assert mean is not None
    left, right = (_place(end, *ends) for end in interval) if interval else (None, None)
    was = _mean(base, reward) if base else None
    return Mark(
        label(stage),
        number(mean),
        between(interval),
        _place(mean, *ends),
        left,
        right - left if right is not None and left is not None else None,
        "" if base is None or was is None else _in_sds(mean - was, base, reward),
        is_before(stage, each),
    )


def _in_sds(change: float, base: Mapping[str, Any], reward: str) -> str:
    """`a rise of 1.40 standard deviations`, of the base's rewards."""
    sd = base["rewards"][reward].get("sd")
    word = "a rise" if change > 0 else "a fall" if change < 0 else "no change"
    if not change or not sd:
        return f"{word} of {number(abs(change))}" if change else word
    return f"{word} of {number(abs(change) / sd)} standard deviations"


def _measures(found: Evaluations) -> list[dict[str, Any]]:
    rows = []
    for measure in _MEASURES:
        cells = [_cell(stage, measure, found) for stage in found]
        if any(cell.text != "–" for cell in cells):
            rows.append({"name": measure.name, "told": measure.told, "cells": cells})
    return rows


def _cell(stage: str, measure: _Measure, found: Evaluations) -> Cell:
    each, base = found[stage], before(stage, found)
    value = _value(each, measure.key)
    if value is None:
        return Cell("–")
    entry = each.get(measure.key)
    interval = entry.get("interval") if isinstance(entry, Mapping) else None
    was = _value(base, measure.key) if base and measure.key != "kl" else None
    lost = measure.better * (value - was) / was if was else 0.0
    spread = between(interval, measure.digits)
    return Cell(number(value, measure.digits), spread, _relative(value, was), lost < -FALL)


def _relative(value: float | None, was: float | None) -> str:
    """`−4.2 %` of what it was."""
    if value is None or not was:
        return ""
    return f"{number(100 * (value / was - 1), 1, sign=True)}\u00a0%"


def _mean(evaluation: Mapping[str, Any] | None, reward: str) -> float | None:
    found = ((evaluation or {}).get("rewards") or {}).get(reward) or {}
    mean = found.get("mean")
    return mean if isinstance(mean, int | float) else None


def _interval(evaluation: Mapping[str, Any], reward: str) -> Sequence[float] | None:
    interval = evaluation["rewards"][reward].get("interval")
    return interval if interval and len(interval) == 2 and None not in interval else None


def _value(evaluation: Mapping[str, Any] | None, key: str) -> float | None:
    found = (evaluation or {}).get(key)
    value = found.get("mean") if isinstance(found, Mapping) else found
    return value if isinstance(value, int | float) else None


def _setting(found: Evaluations, label: Label) -> str:
    """`200 held-out prompts, 4 continuations of each, temperature 1.0`; stage by stage where they differ."""
    told: dict[str, list[str]] = {}
    for stage, each in found.items():
        sampling = each.get("sampling") or {}
        parts = [f"{each['prompts']:,} held-out prompts"] if each.get("prompts") else []
        parts += (
            [f"{each['samples_per_prompt']} continuations of each"] if each.get("samples_per_prompt") else []
        )
        parts += [
            f"{key.replace('_', ' ')} {value}"
            for key, value in sampling.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "seed"
        ]
        told.setdefault(", ".join(parts), []).append(label(stage))
    if len(told) == 1:
        return next(iter(told))
    return "; ".join(f"{', '.join(stages)}: {text}" for text, stages in told.items() if text)


def _prompts(found: Evaluations, label: Label) -> list[dict[str, Any]]:
    """The prompts that most stages answered, with each stage's first continuation and its rewards."""
    answers: dict[str, dict[str, Mapping[str, Any]]] = {}
    for stage, each in found.items():
        for example in each.get("examples") or []:
            answers.setdefault(str(example.get("prompt") or ""), {}).setdefault(stage, example)
    most = max(map(len, answers.values()), default=0)
    full = [prompt for prompt, by_stage in answers.items() if len(by_stage) == most]
    return [
        {
            "prompt": shown(prompt, tail=True),
            "answers": [_answer(s, e, label) for s, e in answers[prompt].items()],
        }
        for prompt in full[: EXAMPLES + MORE_EXAMPLES]
    ]


def _answer(stage: str, example: Mapping[str, Any], label: Label) -> dict[str, Any]:
    rewards = example.get("rewards") or {}
    text: Shown = shown(example.get("completion"))
    told = [(readable(name), number(value)) for name, value in rewards.items() if value is not None]
    return {"label": label(stage), "text": text, "rewards": told}
