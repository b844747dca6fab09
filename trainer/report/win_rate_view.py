"""Win rates of a report turned into what the templates place: who won, how sure that is, and how the judge leans."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from trainer.report.texts import Shown, facts, number, readable, shown

Evaluations = Mapping[str, Mapping[str, Any]]
Label = Callable[[str], str]

AGAINST = {"base": "its base", "answers": "the dataset's answers"}
VERDICTS = ("wins", "ties", "losses", "invalid")
EXAMPLES, MORE_EXAMPLES = 4, 12


@dataclasses.dataclass(frozen=True)
class Part:
    """A share of a bar: `kind` is one of the verdicts, `share` in percent."""

    kind: str
    count: int
    share: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One row: a model against its base, or against the answers; rates are of 1, and None where nothing was decided."""

    label: str
    against: str
    parts: list[Part]
    rate: float | None
    low: float | None
    high: float | None
    sure: str
    winner: str
    notes: str = ""


@dataclasses.dataclass(frozen=True)
class Leaning:
    """How the judge leaned in one comparison, each as a sentence."""

    title: str
    told: list[str]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One question with both answers; `verdict` names who was better, `orders` what was said in each order."""

    title: str
    question: Shown
    answers: list[tuple[str, Shown]]
    verdict: str
    orders: str


def win_rate_view(found: Evaluations, label: Label) -> dict[str, Any]:
    """`rows`, `judges`, `leanings`, `verdicts` with their texts, `places` of all, and why a judge `stopped`."""
    found = {name: each for name, each in found.items() if each}
    if not found:
        return {}
    verdicts = [verdict for stage, each in found.items() for verdict in _verdicts(each, label(stage))]
    judges: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for stage, each in found.items():
        judges.setdefault(tuple(facts(each.get("judge"))), []).append(label(stage))
    places = dict.fromkeys(readable(each["verdicts"]) for each in found.values() if each.get("verdicts"))
    return {
        "rows": [row for stage, each in found.items() for row in _rows(each, label(stage))],
        "judges": [
            ("; ".join(stages) if len(judges) > 1 else "", list(told)) for told, stages in judges.items()
        ],
        "leanings": [told for stage, each in found.items() for told in _leanings(each, label(stage))],
        "verdicts": verdicts[:EXAMPLES],
        "more_verdicts": verdicts[EXAMPLES : EXAMPLES + MORE_EXAMPLES],
        "tests": "; ".join(_tests(found)),
        "places": list(places),
        "stopped": list(
            dict.fromkeys(readable(each["stopped"]) for each in found.values() if each.get("stopped"))
        ),
    }


def headline(found: Evaluations, label: Label) -> str:
    """Each comparison's counts and rate, in one sentence for each model."""
    told = []
    for stage, each in found.items():
        parts = []
        for row in _rows(each, label(stage)) if each else ():
            counts = {part.kind: part.count for part in row.parts}
            rate = "" if row.rate is None else f", a win rate of {_percent(row.rate)}{_spread(row)}"
            parts.append(
                f"{counts.get('wins', 0)} wins and {counts.get('losses', 0)} losses against {row.against}{rate}"
            )
        if parts:
            told.append(f"{label(stage)}: {'; '.join(parts)}.")
    return "\n".join(told)


def _rows(evaluation: Mapping[str, Any], label: str) -> list[Comparison]:
    return [
        _row(against, found, label) for against, found in (evaluation.get("against") or {}).items() if found
    ]


def _row(against: str, found: Mapping[str, Any], label: str) -> Comparison:
    counts = {kind: int(found.get(kind) or 0) for kind in VERDICTS}
    total = sum(counts.values())
    low, high = found.get("interval") or (None, None)
    return Comparison(
        label,
        against_text(against),
        [Part(kind, count, 100 * count / total) for kind, count in counts.items() if count],
        found.get("win_rate"),
        low,
        high,
        _sure(found),
        _winner(str(found.get("winner") or ""), against),
        _notes(found),
    )


def _notes(found: Mapping[str, Any]) -> str:
    """What the counts do not say: ties without a question, invalid ones without an answer."""
    told = [f"{found['identical']} with the same text twice"] if found.get("identical") else []
    told += [f"{found['unanswered']} without an answer"] if found.get("unanswered") else []
    return ", ".join(told)


def _winner(winner: str, against: str) -> str:
    """The evaluation calls whatever the model was compared with the base."""
    if winner == "Base" and against != "base":
        return against_text(against)
    return {"Both": "a tie"}.get(winner, readable(winner))


def against_text(against: str) -> str:
    return AGAINST.get(against, readable(against))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}\u00a0%"


def _spread(row: Comparison) -> str:
    if row.low is None or row.high is None:
        return ""
    return f" (95\u00a0% interval {100 * row.low:.1f}–{_percent(row.high)})"


def _sure(found: Mapping[str, Any]) -> str:
    """`p = 0.003`, of the test that `tests` names."""
    p = found.get("p_value")
    return "" if p is None else "p < 0.001" if p < 0.001 else f"p = {number(p, 3)}"


def _tests(found: Evaluations) -> list[str]:
    rows = [row for each in found.values() for row in (each.get("against") or {}).values() if row]
    return list(dict.fromkeys(readable(row["test"]) for row in rows if row.get("test")))


def _leanings(evaluation: Mapping[str, Any], label: str) -> list[Leaning]:
    rows = []
    for against, found in (evaluation.get("against") or {}).items():
        told = _leaning(found or {})
        if told:
            rows.append(Leaning(f"{label} against {against_text(against)}", told))
    return rows


def _leaning(found: Mapping[str, Any]) -> list[str]:
    told = []
    if found.get("order_agreement") is not None:
        told.append(
            f"Both orders gave the same verdict in {_percent(found['order_agreement'])} of the comparisons."
        )
    for key, name in (("position_bias", "the first answer"), ("length_bias", "the longer answer")):
        bias = found.get(key)
        if isinstance(bias, Mapping) and bias.get("rate") is not None:
            told.append(_bias(bias, name))
    return told


def _bias(bias: Mapping[str, Any], name: str) -> str:
    """`It picked the first answer in 61.0 % of 76 picks (...): more often than the other.`"""
    of = f" of {bias['picks']:,} picks" if bias.get("picks") else ""
    text = f"It picked {name} in {_percent(bias['rate'])}{of}"
    if not bias.get("interval") or None in bias["interval"]:
        return text + "."
    low, high = (0.5 + end for end in bias["interval"])
    leans = (
        "it leans to it" if low > 0.5 else "it leans away from it" if high < 0.5 else "no leaning is certain"
    )
    return f"{text} (95\u00a0% interval {100 * low:.1f}–{_percent(high)}): {leans}."


def _verdicts(evaluation: Mapping[str, Any], label: str) -> list[Verdict]:
    """The first ones of each comparison, by turns."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in evaluation.get("examples") or []:
        found.setdefault(str(row.get("against") or "base"), []).append(row)
    turns = itertools.zip_longest(*found.values())
    return [_verdict(row, label) for turn in turns for row in turn if row is not None]


def _verdict(row: Mapping[str, Any], label: str) -> Verdict:
    against = str(row.get("against") or "base")
    other = {"base": "Base", "answers": "The dataset's answer"}.get(against, readable(against))
    return Verdict(
        f"{label} against {against_text(against)}",
        shown(row.get("question"), tail=True),
        [(label, shown(row.get("dpo"))), (other, shown(row.get("other")))],
        readable(row.get("verdict") or "no verdict"),
        _told(row.get("orders")),
    )


def _told(orders: Any) -> str:
    """`Standing first: win; standing second: tie`, where both orders are told."""
    if not isinstance(orders, list) or len(orders) != 2:
        return ""
    first, second = (readable(order or "invalid") for order in orders)
    return f"Standing first: {first}; standing second: {second}."
