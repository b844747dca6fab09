"""A summary of pairs turned into what the templates place: what was kept, what the numbers say, examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.report.judging_view import judging_view, parts
from trainer.report.runs import duration
from trainer.report.texts import facts, number, readable, shown

Summary = Mapping[str, Any]

_CORRELATED = 0.2

_ENDS = {
    "widest": ("Widest margins", "Where chosen and rejected differ most: is that what training should want?"),
    "middle": ("From the middle", "Pairs with a margin near the median."),
    "narrowest": ("Narrowest margins", "Where the scores hardly differ: these teach the least, or noise."),
    "first": ("Examples", "The first pairs, as they come."),
}
# What a count counts, where its name alone does not say it.
_DROPPED = {
    "tie": "every score the same",
    "margin": "margin too small",
    "duplicate": "the same text again",
    "short": "too short",
    "identical": "chosen and rejected the same",
    "empty": "an empty text",
    "prompts_differ": "chosen and rejected to different prompts",
    "broken": "broken rows",
    "over_limit": "beyond the limit",
}


def pairs_view(summary: Summary, title: str = "") -> dict[str, Any]:
    """`title`, `headline`, `flow`, `table`, `notes`, `groups` of examples, `facts` and where it came from."""
    return {
        "title": readable(title or summary.get("title") or "pairs"),
        "headline": headline(summary),
        "created": str(summary.get("created") or "").replace("T", " ").replace("+00:00", " UTC"),
        "flow": _flow(summary.get("counts") or {}),
        "table": _table(summary),
        "notes": _notes(summary),
        "judging": judging_view(summary),
        "groups": [
            _group(name, found, _names(summary))
            for name, found in (summary.get("examples") or {}).items()
            if found
        ],
        "facts": facts(summary.get("builder") or {}) + _made(summary),
        "versions": ", ".join(f"{name} {value}" for name, value in (summary.get("versions") or {}).items()),
        "code": f"git {summary['git']}" if summary.get("git") else "",
    }


def headline(summary: Summary) -> str:
    """How many pairs there are, and how far their scores lie apart."""
    count, counts = summary.get("pairs") or 0, summary.get("counts") or {}
    asked = counts.get("prompts")
    text = f"{count:,} pair{'s' * (count != 1)}" + (f" from {asked:,} prompts" if asked else "")
    scores, margin = summary.get("scores"), summary.get("margin")
    if scores and margin:
        chosen, rejected = (number(scores[side]["mean"]) for side in ("chosen", "rejected"))
        text += f": the chosen score {chosen} on average, the rejected {rejected}"
        text += f", a margin of {number(margin['mean'])}"
    return text + "."


def _flow(counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Kept, and why the others were not: name, count, share of all in percent."""
    found = {name: count for name, count in counts.items() if isinstance(count, int)}
    whole = found.get("prompts") or found.get("rows") or found.get("kept") or 0
    rows = [("Kept", found.get("kept", 0), "kept")]
    for name, count in found.items():
        if name.startswith("dropped_") and count:
            reason = name.removeprefix("dropped_")
            rows.append(
                (f"Left out: {_DROPPED.get(reason, readable(reason.replace('_', ' ')))}", count, "left")
            )
    return [
        {
            "name": name,
            "count": f"{count:,}",
            "kind": kind,
            "share": min(100.0, 100 * count / whole) if whole else 0.0,
        }
        for name, count, kind in rows
    ]


def _table(summary: Summary) -> dict[str, Any]:
    """Scores, lengths and ends of the chosen, the rejected and all candidates, as far as they are known."""
    scores, lengths, finished = (summary.get(part) or {} for part in ("scores", "lengths", "finished"))
    candidates = summary.get("candidates") or {}
    rows = [
        (
            "Score, mean",
            *(_mean(scores.get(side)) for side in ("chosen", "rejected")),
            _mean(candidates.get("score")),
        ),
        (
            "Score, deviation",
            *(_sd(scores.get(s)) for s in ("chosen", "rejected")),
            _sd(candidates.get("score")),
        ),
        (
            "Characters, median",
            *(_median(lengths.get(side)) for side in ("chosen", "rejected")),
            "–",
        ),
        (
            "Finished",
            *(_share(finished.get(s)) for s in ("chosen", "rejected")),
            _share(candidates.get("finished")),
        ),
    ]
    rows = [row for row in rows if set(row[1:]) != {"–"}]
    columns = ["Chosen", "Rejected"] + (["All"] if candidates else [])
    return {"columns": columns, "rows": [(row[0], list(row[1 : len(columns) + 1])) for row in rows]}


def _mean(found: Mapping[str, float] | None) -> str:
    return number(found["mean"]) if found else "–"


def _sd(found: Mapping[str, float] | None) -> str:
    return number(found["sd"]) if found else "–"


def _median(found: Mapping[str, float] | None) -> str:
    return number(found["median"], 0) if found else "–"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}\u00a0%"


def _notes(summary: Summary) -> list[str]:
    """What one should know before training: whether length decides."""
    notes, lengths, candidates = [], summary.get("lengths"), summary.get("candidates") or {}
    if lengths:
        equal = lengths["equally_long"]
        notes.append(
            f"The chosen text is the longer one in {_share(lengths['chosen_longer'])} of the pairs"
            + (f", equally long in {_share(equal)}." if equal else ".")
        )
    correlation = candidates.get("score_with_length")
    if correlation is not None:
        told = f"Over all {candidates['texts']:,} candidates, scores and lengths in tokens correlate by"
        longer = "longer" if correlation > 0 else "shorter"
        means = (
            f": {longer} texts score higher, and a policy may learn just that"
            if abs(correlation) >= _CORRELATED
            else ""
        )
        notes.append(f"{told} {number(correlation)}{means}.")
    if left := _left_texts(summary.get("counts") or {}):
        notes.append(f"Of the candidates were left out: {left}.")
    return notes


def _left_texts(counts: Mapping[str, Any]) -> str:
    """Single texts that no pair was made of, by their reason."""
    reasons = {"short": "too short", "duplicate": "the same text again", "invalid": "without a finite score"}
    found = {told: counts.get(f"candidates_{name}") for name, told in reasons.items()}
    return ", ".join(f"{count:,} {told}" for told, count in found.items() if isinstance(count, int) and count)


def _made(summary: Summary) -> list[tuple[str, str]]:
    return [("Time", duration(summary["seconds"]))] if summary.get("seconds") is not None else []


def _names(summary: Summary) -> Mapping[str, str]:
    """What criteria are called."""
    return (summary.get("judging") or {}).get("names") or {}


def _group(name: str, found: list[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, Any]:
    title, note = _ENDS.get(name, (readable(name), ""))
    return {"title": title, "note": note, "pairs": [_pair(each, names) for each in found]}


def _pair(example: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    scores = example.get("chosen_score"), example.get("rejected_score")
    margin = scores[0] - scores[1] if scores[0] is not None and scores[1] is not None else None
    sides = [
        {
            "side": side,
            "text": shown(example.get(side)),
            "score": "" if score is None else number(score),
            "parts": parts(example.get(f"{side}_scores"), names),
            "cut": example.get(f"{side}_finished") is False,
        }
        for side, score in zip(("chosen", "rejected"), scores, strict=True)
    ]
    margin_text = "" if margin is None else number(margin)
    return {"prompt": shown(example.get("prompt"), tail=True), "margin": margin_text, "sides": sides}
