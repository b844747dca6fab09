"""A model's scores of its own answers in words: by criterion, and what should make one doubt them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.report.texts import Shown, number, readable, shown

_CORRELATED, _AGREES, _TIED, _OTHER, _LOW = 0.3, 0.65, 0.2, 0.1, 0.5
"""From where on a note says what a number means."""
_LANGUAGES = {"ru": "Russian", "en": "English"}


def judging_view(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """`table` of scores by criterion, its `legend`, `notes`, and `unread` answers; None where nothing judged itself."""
    found = summary.get("judging")
    if not found:
        return None
    others = summary.get("rescored") or []
    return {
        "table": _table(found, others),
        "legend": "Length correlation: Spearman's, with the answer's characters."
        + ("".join(f" {_said(each)}" for each in others)),
        "notes": _notes(found) + [_other(each) for each in others],
        "unread": [
            {
                "why": readable(str(each.get("why"))),
                "said": _shown(each.get("said")),
                "prompt": readable(str(each.get("prompt") or "")),
            }
            for each in found.get("unread_examples") or []
        ],
    }


def parts(scores: Any, names: Mapping[str, str]) -> str:
    """`Brevity 4.00, Clarity 3.50`; empty where an answer has one score only."""
    if not isinstance(scores, Mapping) or len(scores) < 2:
        return ""
    return ", ".join(f"{readable(names.get(key, key))} {number(value)}" for key, value in scores.items())


def _shown(said: Any) -> Shown:
    return shown(said or "")


def _said(other: Mapping[str, Any]) -> str:
    judge = other.get("judge") or {}
    named = readable(str(judge.get("model") or judge.get("class") or "another judge"))
    told = f"{readable(str(other.get('label')))}: {named}"
    if other.get("same_rubric") is False:
        return f"{told}, asked by another rubric."
    return f"{told}, its mean and its Spearman correlation with the model's own."


def _table(found: Mapping[str, Any], others: list[Mapping[str, Any]]) -> dict[str, Any]:
    names = found.get("names") or {}
    columns = ["Mean", "Deviation", "Chosen", "Rejected", "With length"]
    columns += [
        f"{readable(str(each.get('label')))}{what}" for each in others for what in (", mean", ", agreement")
    ]
    rows = []
    for key, each in (found.get("criteria") or {}).items():
        own = [
            number(each.get(name)) for name in ("mean", "sd", "chosen_mean", "rejected_mean", "with_length")
        ]
        beside = [_of(other, key) for other in others]
        own += [number(one.get(name)) for one in beside for name in ("mean", "spearman")]
        rows.append((readable(names.get(key, "The whole answer" if key == "estimate" else key)), own))
    return {"columns": columns, "rows": rows}


def _of(other: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Another judge's mean and agreement by a criterion, or by all of them for a score of the whole answer.

    By another rubric a criterion of the same key is another one.
    """
    if key == "estimate":
        return {"mean": other.get("mean"), "spearman": other["compared"]["spearman"]}
    return {} if other.get("same_rubric") is False else (other.get("criteria") or {}).get(key) or {}


def _notes(found: Mapping[str, Any]) -> list[str]:
    parts = (_asked, _mass, _unread, _ties, _length, _language, _agreement, _same)
    return [note for part in parts for note in part(found)]


def _asked(found: Mapping[str, Any]) -> list[str]:
    way = {
        "apart": "in a call of its own for each criterion, as the expected value of the digits 1 to 5",
        "together": "in one go with the answer",
    }.get(str(found.get("way")), "")
    return [f"{found['labelled']:,} of {found['answers']:,} answers have a score, given {way}."]


def _mass(found: Mapping[str, Any]) -> list[str]:
    return [_held(found["mass"])] if found.get("mass") else []


def _held(mass: Mapping[str, Any]) -> str:
    """How much of the probability the digits had before it was shared out among them."""
    told = f"The digits held {_percent(mass['mean'])} of the probability on average, {_percent(mass['min'])} at the"
    told += f" least, and less than half in {_percent(mass['below_half'])} of {mass['questions']:,} questions"
    low = ": mostly the model would not have answered with a digit, and its scores say little."
    return told + (low if mass["mean"] < _LOW else ".")


def _unread(found: Mapping[str, Any]) -> list[str]:
    notes = []
    for name, told in (("unread", "No score could be read from"), ("repaired", "Mended while reading:")):
        if reasons := found.get(name):
            counts = ", ".join(
                f"{readable(why.replace('_', ' '))} {count:,}" for why, count in reasons.items()
            )
            total = f" {sum(reasons.values()):,} answers:" if name == "unread" else ""
            notes.append(f"{told}{total} {counts}.")
    return notes


def _ties(found: Mapping[str, Any]) -> list[str]:
    ties = found["ties"]
    if ties["share"] is None:
        return []
    told = f"All answers have one score in {ties['prompts']:,} of {ties['of']:,} prompts ({_percent(ties['share'])})"
    told += f"; two answers of a prompt round to the same mark in {_percent(ties['answer_pairs_rounded'])} of cases"
    return [told + (": such scores tell little apart." if ties["answer_pairs_rounded"] >= _TIED else ".")]


def _length(found: Mapping[str, Any]) -> list[str]:
    whole, within = found["with_length"]["all"], found["with_length"]["within_prompts"]
    if whole is None:
        return []
    told = f"Scores and lengths correlate by {number(whole)}, among the answers of one prompt by {number(within)}"
    strongest = max((value for value in (whole, within) if value is not None), key=abs)
    longer = "longer" if strongest > 0 else "shorter"
    return [
        told
        + (f": {longer} answers score higher, whatever they say." if abs(strongest) >= _CORRELATED else ".")
    ]


def _language(found: Mapping[str, Any]) -> list[str]:
    language = found["language"]
    if language["share"] is None:
        return []
    wanted = _LANGUAGES.get(language["wanted"], language["wanted"])
    told = (
        f"{language['other']:,} of {language['answers']:,} answers ({_percent(language['share'])}) are not in"
    )
    told += f" {wanted}, by the script of their letters; {language['without_letters']:,} have no letters"
    told += ": look at the prompts." if language["share"] >= _OTHER else "."
    missing = language.get("not_read")
    return [
        told + (f" Of {missing:,} more nothing could be read: they count for neither." if missing else "")
    ]


def _agreement(found: Mapping[str, Any]) -> list[str]:
    apart = found.get("way") == "together"
    how = "in a second call, criterion by criterion" if apart else "in other words"
    return [
        f"Scored again {how} ({number(place, 0)}): {_compared(each)}"
        + (f" {_held(each['mass'])}" if each.get("mass") else "")
        for place, each in enumerate(found["agreement"], 1)
    ]


def _same(found: Mapping[str, Any]) -> list[str]:
    same = found["same_answers"]
    if found.get("way") != "together" or not same["texts"]:
        return []
    return [
        f"{same['texts']:,} answers were given more than once to a prompt; {_percent(same['same_score'])} of them got"
        " the same score each time."
    ]


def _other(other: Mapping[str, Any]) -> str:
    told = f"Another judge ({readable(str(other.get('label')))}): {_compared(other['compared'])}"
    if other.get("same_rubric") is False:
        told += " It was asked by another rubric than the one the pairs were made by: criteria are not comparable."
    return told + (f" {_held(other['mass'])}" if other.get("mass") else "")


def _compared(each: Mapping[str, Any]) -> str:
    confirmed, against = each["pairs_confirmed"], each.get("pairs_contradicted")
    tied = each.get("pairs_tied") or 0.0
    told = f"Spearman {number(each['spearman'])}, {number(each['mean_absolute_difference'])} points apart on average"
    told += f", the same mark for {_percent(each['same_rounded'])}"
    told += f"; {_percent(confirmed)} of the pairs in the same order"
    if against is not None:
        told += f", {_percent(against)} the other way round, {_percent(tied)} tied"
    # A coin that is tossed for each tie is right in half of them.
    chance = confirmed is not None and confirmed + tied / 2 < _AGREES
    return told + (": hardly more than chance." if chance else ".")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}\u00a0%"
