"""Whether a model's scores of itself can be trusted: ties, agreement with themselves and others, length, language."""

from __future__ import annotations

import itertools
import math
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from scipy import stats

from trainer.ledger import Row
from trainer.pairs.building import Pair
from trainer.pairs.rubric import Language
from trainer.pairs.scoring import told_of

LISTED = 20
_SAID, _BEGINNING = 300, 80
Candidate = Mapping[str, Any]


def findings(
    rows: Sequence[Row], pairs: Sequence[tuple[Row, Pair]], language: Language, threshold: float
) -> dict[str, Any]:
    """What the manifest says of self-judged rows.

    `answers`, `labelled`; `unread` and `repaired` (reason -> answers) and `unread_examples`; `mass` (how much of the
    probability the digits had in the labels' questions: `trainer.pairs.scoring.told_of`); `ties`; `criteria` (each
    score's mean, deviation, means of chosen and rejected, rank correlation with length); `with_length` of the labels;
    `language`; `agreement` with each further scoring; `same_answers` (the same text given again by a prompt's samples).
    Correlations are Spearman's, lengths characters; None where there is nothing to correlate.
    """
    every = [each for row in rows for each in row["candidates"]]
    labelled = [each for each in every if each.get("score") is not None]
    return {
        "answers": len(every),
        "labelled": len(labelled),
        "unread": dict(Counter(each["invalid"].partition(" (")[0] for each in every if each.get("invalid"))),
        "unread_examples": _unread(rows),
        "repaired": dict(Counter(repair for each in every for repair in each.get("repairs", ()))),
        "ties": _ties(rows, pairs),
        "criteria": _by_criterion(labelled, [pair for _, pair in pairs]),
        "mass": told_of(mass for each in _once(rows) for mass in (each.get("mass") or {}).values()),
        "with_length": {
            "answers": len(labelled),
            "all": spearman([(each["score"], len(each["text"])) for each in labelled]),
            "within_prompts": _within(rows),
        },
        "language": _language(every, language, threshold),
        "agreement": _agreement(rows, labelled, [pair for _, pair in pairs]),
        "same_answers": _same(rows),
    }


def spearman(points: Sequence[tuple[float, float]]) -> float | None:
    """The rank correlation of pairs of numbers; None for fewer than three, or where one side never changes."""
    # Sums of digits' shares differ in their last bits where they mean the same.
    points = [(round(a, 9), round(b, 9)) for a, b in points]
    if len(points) < 3 or any(len({each[side] for each in points}) < 2 for side in (0, 1)):
        return None
    first, second = zip(*points, strict=True)
    found = float(stats.spearmanr(first, second).statistic)
    return found if math.isfinite(found) else None


LETTERS: Mapping[Language, str] = {"ru": "CYRILLIC", "en": "LATIN"}
"""What the Unicode names of a language's letters begin with."""


def script_share(text: str, language: Language) -> float | None:
    """The share of a language's script (Cyrillic, Latin) among a text's letters; None where it has none."""
    letters = [char for char in text if char.isalpha()]
    own = sum(unicodedata.name(char, "").startswith(LETTERS[language]) for char in letters)
    return own / len(letters) if letters else None


def compared(
    own: Iterable[tuple[Candidate, float | None]], pairs: Iterable[tuple[float | None, float | None]]
) -> dict[str, Any]:
    """How other scores of the same answers agree with the labels.

    Args:
        own: labelled candidates with their other score; without one they are left out.
        pairs: the other scores of chosen and rejected of each pair: they confirm its order, contradict it, or are tied.
    """
    both = [(each["score"], other) for each, other in own if other is not None]
    known = [(chosen, rejected) for chosen, rejected in pairs if chosen is not None and rejected is not None]
    # Sums of digits' shares differ in their last bits where they mean the same.
    orders = [round(chosen - rejected, 6) for chosen, rejected in known]
    return {
        "answers": len(both),
        "spearman": spearman(both),
        "mean_difference": statistics.fmean(other - score for score, other in both) if both else None,
        "mean_absolute_difference": statistics.fmean(abs(other - score) for score, other in both)
        if both
        else None,
        "same_rounded": _share(_rounded(score) == _rounded(other) for score, other in both),
        "pairs": len(known),
        "pairs_confirmed": _share(order > 0 for order in orders),
        "pairs_contradicted": _share(order < 0 for order in orders),
        "pairs_tied": _share(order == 0 for order in orders),
    }


def _rounded(score: float) -> int:
    return math.floor(score + 0.5)


def _share(found: Iterable[bool]) -> float | None:
    values = [float(each) for each in found]
    return statistics.fmean(values) if values else None


def _unread(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The first answers that no score could be read from; all of them stand in the candidates.

    Of those that say nothing (the prompt was too long, say) the prompt tells which they are, and the first stands for
    all samples.
    """
    found = (
        {
            "key": row["key"],
            "sample": number,
            "why": each["invalid"],
            "prompt": row["prompt"][:_BEGINNING],
            "said": each.get("said", each["text"])[:_SAID],
        }
        for row in rows
        for number, each in enumerate(row["candidates"])
        if each.get("invalid")
    )
    seen: set[tuple[str, str]] = set()
    listed = []
    for each in found:
        if not each["said"] and (each["key"], each["why"]) in seen:
            continue
        seen.add((each["key"], each["why"]))
        listed.append(each)
        if len(listed) == LISTED:
            break
    return listed


def _ties(rows: Sequence[Row], pairs: Sequence[tuple[Row, Pair]]) -> dict[str, Any]:
    """Prompts whose answers all have one score; and of a prompt's different answers, two by two, how many have one."""
    texts = [list(_first_scores(row["candidates"]).values()) for row in rows]
    comparable = [scores for scores in texts if len(scores) > 1]
    couples = [couple for scores in comparable for couple in itertools.combinations(scores, 2)]
    tied = sum(len(set(scores)) == 1 for scores in comparable)
    return {
        "prompts": tied,
        "of": len(comparable),
        "share": tied / len(comparable) if comparable else None,
        "answer_pairs": _share(a == b for a, b in couples),
        "answer_pairs_rounded": _share(_rounded(a) == _rounded(b) for a, b in couples),
    }


def _first_scores(candidates: Sequence[Candidate]) -> dict[str, float]:
    """The score of each different text; of one that came again, the first, as a pair takes it."""
    found: dict[str, float] = {}
    for each in candidates:
        if each.get("score") is not None:
            found.setdefault(each["text"], each["score"])
    return found


def _by_criterion(labelled: Sequence[Candidate], pairs: Sequence[Pair]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for each in labelled for key in each["scores"]):
        having = [each for each in labelled if key in each["scores"]]
        values = [each["scores"][key] for each in having]
        sides = {
            side: [one.get("scores", {}).get(key) for one in (getattr(pair, side) for pair in pairs)]
            for side in ("chosen", "rejected")
        }
        found[key] = {
            "answers": len(values),
            "mean": statistics.fmean(values),
            "sd": statistics.pstdev(values),
            **{f"{side}_mean": _mean(each) for side, each in sides.items()},
            "with_length": spearman([(each["scores"][key], len(each["text"])) for each in having]),
        }
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _within(rows: Sequence[Row]) -> float | None:
    """The mean over prompts of the correlation among a prompt's own answers: no prompt is longer than another there."""
    found = [
        spearman(
            [
                (each["score"], len(each["text"]))
                for each in row["candidates"]
                if each.get("score") is not None
            ]
        )
        for row in rows
    ]
    return _mean(found)


def _language(every: Sequence[Candidate], language: Language, threshold: float) -> dict[str, Any]:
    """Answers by the script of their letters: the wanted one, or another.

    `not_read`: answers that are in none of the other counts, since nothing of them could be read, or they say nothing:
    what a model said instead is mostly JSON, whose letters are not its answer's.
    """
    said = [each["text"] for each in every if each["text"].strip()]
    shares = [script_share(text, language) for text in said]
    known = [share for share in shares if share is not None]
    other = sum(share < threshold for share in known)
    return {
        "wanted": language,
        "threshold": threshold,
        "answers": len(known),
        "without_letters": len(shares) - len(known),
        "not_read": len(every) - len(said),
        "other": other,
        "share": other / len(known) if known else None,
    }


def _agreement(
    rows: Sequence[Row], labelled: Sequence[Candidate], pairs: Sequence[Pair]
) -> list[dict[str, Any]]:
    """Of each further scoring with the label, in the order of the wordings."""
    times = max((len(each.get("again", ())) for each in labelled), default=0)
    return [
        compared(
            [(each, _again(each, time)) for each in labelled],
            [(_again(pair.chosen, time), _again(pair.rejected, time)) for pair in pairs],
        )
        | {"mass": told_of(_again_masses(rows, time))}
        for time in range(times)
    ]


def _again_masses(rows: Sequence[Row], time: int) -> Iterator[float | None]:
    for each in _once(rows):
        if noted := each.get("again_mass"):
            yield from noted[time].values()


def _once(rows: Sequence[Row]) -> Iterator[Candidate]:
    """Each prompt's answers, the same one once: that is how often they are scored apart."""
    for row in rows:
        yield from {each["text"]: each for each in row["candidates"]}.values()


def _again(candidate: Candidate, time: int) -> float | None:
    scores = candidate["again"][time]
    return None if scores is None else math.fsum(scores.values()) / len(scores)


def _same(rows: Sequence[Row]) -> dict[str, Any]:
    """Answers that a prompt's samples gave more than once, and the share of them whose scores were the same each time.

    Scores in one go are sampled with the answer, so this is the one repetition there is; scores apart follow from it.
    """
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for each in row["candidates"]:
            if each.get("score") is not None:
                scores.setdefault((row["key"], each["text"]), []).append(each["score"])
    again = [found for found in scores.values() if len(found) > 1]
    return {"texts": len(again), "same_score": _share(len(set(found)) == 1 for found in again)}
